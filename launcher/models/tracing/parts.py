"""The parts of a causal language model that are looked at one by one, and which of its layers are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from planner.base.errors import InputError

MAX_KINDS = 16
"""Kinds of layers that are traced; a published model has up to four."""
_SKIPPED_NAMES = frozenset({"layer_idx", "layer_index", "layer_id", "training"})


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Embeddings, one list of decoder layers, the norm after them, and the head; `base` runs all but the
    head.
    """

    base: Any
    embedding: nn.Module
    layers: nn.ModuleList
    layers_path: str
    norm: nn.Module
    head: nn.Linear


def parts_of(model: Any) -> Parts:
    """Find a model's parts.

    Raises:
        InputError: the model is built otherwise.
    """
    base, head, embedding = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
    if base is model:
        # Llama 4's prefix names a part that only its vision model has.
        base = getattr(model, "model", model)
    count = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.count(".") <= 1
    ]
    if base is model or not isinstance(head, nn.Linear) or len(found) != 1:
        raise InputError(f"{type(model).__name__} is not built of embeddings, one list of layers, and a head")
    path, layers = found[0]
    return Parts(
        base=base,
        embedding=embedding,
        layers=layers,
        layers_path=path,
        norm=_final_norm(base, embedding, layers),
        head=head,
    )


def _final_norm(base: Any, embedding: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """The one part of the base model with weights beside embeddings and layers."""
    others = [
        (name, module)
        for name, module in base.named_children()
        if module not in (layers, embedding) and any(True for _ in module.parameters())
    ]
    if len(others) != 1:
        names = ", ".join(name for name, _ in others) or "no norm"
        raise InputError(
            f"{type(base).__name__} has {names} beside its layers, where one norm is expected: what runs "
            "there, and what it hands to each layer, is not traced"
        )
    return others[0][1]


def kinds_of(layers: nn.ModuleList) -> list[tuple[int, ...]]:
    """Positions of layers that are built alike: of the same modules, weights and settings.

    Raises:
        InputError: more than MAX_KINDS.
    """
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(tuple(_built(layer)), []).append(index)
    if len(found) > MAX_KINDS:
        raise InputError(f"its layers are of {len(found)} kinds; at most {MAX_KINDS} are traced")
    return [tuple(indices) for indices in found.values()]


def _built(layer: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What a layer is built of, module by module; numbers with fractions change no memory."""
    for path, module in layer.named_modules():
        weights = tuple((name, tuple(one.shape)) for name, one in module.named_parameters(recurse=False))
        settings = tuple(
            sorted((name, repr(value)) for name, value in vars(module).items() if _is_setting(name, value))
        )
        yield path, type(module).__name__, weights, settings


def _is_setting(name: str, value: object) -> bool:
    hidden = name.startswith("_") or name in _SKIPPED_NAMES
    return not hidden and isinstance(value, bool | int | str | tuple | None)
