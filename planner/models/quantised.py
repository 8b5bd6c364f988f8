"""Models whose weights lie as a quantised checkpoint has them: what of them is quantised, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.base.errors import InputError, shorten
from planner.models.checkpoint import Checkpoint
from planner.models.parameter import Parameter
from planner.models.spec import LayerSpec, ModelSpec
from planner.models.storage import QUANTIZED_CLASSES


def is_kept(module: str, kept: Iterable[str]) -> bool:
    """Whether a module stays as it is: an entry is the beginning of its path, up to a dot, or its end."""
    return any(
        module == entry
        or module.endswith(entry)
        or module.startswith(entry if entry.endswith(".") else f"{entry}.")
        for entry in kept
    )


def with_checkpoint(spec: ModelSpec, checkpoint: Checkpoint | None) -> ModelSpec:
    """A model whose weights lie as a checkpoint has them: modules that it left in 16 bits are told apart, and
    layers that have such modules from those that do not.

    Raises:
        InputError: its head is quantised, or it tells layers apart whose places are not known.
    """
    if checkpoint is None:
        return spec
    kept = checkpoint.kept
    if kept is None:
        return replace(spec, checkpoint=checkpoint, download_bytes=_stored_bytes(spec, checkpoint))
    if not any(p.is_output_head and is_kept(_module(p.name), kept) for p in spec.parameters):
        raise InputError(
            f"{shorten(spec.hub_id)}: its output head is quantised too, which is not trained: use a copy "
            "whose llm_int8_skip_modules names lm_head"
        )
    parameters: list[Parameter] = []
    by_layer: dict[int, list[str]] = {}
    for parameter in spec.parameters:
        parameters += _told_apart(spec, parameter, kept, by_layer)
    layers: list[LayerSpec] = []
    for layer in spec.layers:
        groups: dict[tuple[str, ...], list[int]] = {}
        for index in layer.indices:
            groups.setdefault(tuple(sorted(by_layer.get(index, ()))), []).append(index)
        layers += [replace(layer, indices=tuple(own), kept=names) for names, own in groups.items()]
    found = replace(spec, parameters=tuple(parameters), layers=tuple(layers), checkpoint=checkpoint)
    return replace(found, download_bytes=_stored_bytes(found, checkpoint))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _told_apart(
    spec: ModelSpec, parameter: Parameter, kept: tuple[str, ...], by_layer: dict[int, list[str]]
) -> list[Parameter]:
    """A parameter, or what of its layers is quantised and what is kept, whose name `by_layer` takes."""
    if parameter.kind != "weight" or parameter.module_class not in QUANTIZED_CLASSES:
        return [parameter]
    if not parameter.in_decoder_layer:
        return [replace(parameter, kept=is_kept(_module(parameter.name), kept))]
    paths = [_module(parameter.name.replace("*", str(index))) for index in range(spec.num_hidden_layers)]
    indices = [index for index, path in enumerate(paths) if is_kept(path, kept)]
    if not indices:
        return [parameter]
    if parameter.count != spec.num_hidden_layers:
        raise InputError(
            f"{shorten(spec.hub_id)}: llm_int8_skip_modules names {parameter.module_name}, which only some "
            "layers have: use the 16-bit model, which QLoRA quantises while loading"
        )
    for index in indices:
        by_layer.setdefault(index, []).append(parameter.module_name)
    whole = replace(parameter, kept=True, count=len(indices))
    rest = parameter.count - len(indices)
    return [replace(parameter, count=rest), whole] if rest else [whole]


def _stored_bytes(spec: ModelSpec, checkpoint: Checkpoint) -> int:
    """The size of the weights as they are published."""
    # Beside its packed elements a weight has constants: 4 bytes a block of 64, with double quantisation one.
    constants = 1 if checkpoint.double_quant else 4
    total = 0
    for parameter in spec.parameters:
        if parameter.tied:
            continue
        four = parameter.module_class in QUANTIZED_CLASSES and parameter.kind == "weight"
        if four and not parameter.kept and not parameter.is_output_head:
            size = parameter.elements // 2 + parameter.elements // 64 * constants
            if checkpoint.bits == 8:
                size = parameter.elements + 4 * parameter.shape[0]
        else:
            size = checkpoint.plain_width * parameter.elements
        total += size * parameter.count
    return total
