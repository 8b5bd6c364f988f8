"""Adapters on a base without weights: PEFT's own layers, in which one weight at a time is put and merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.merging.adapter_folder import WEIGHTS, AdapterFolder
from launcher.training.loading.base_folder import BaseFolder
from launcher.training.loading.skeleton import empty_model, model_config
from planner.base.errors import InputError, shorten

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
"""Before every name of the base's in a model of PEFT's, and in what it saves."""
_PART = 2**22
"""Numbers that are compared at once, so that the comparison takes no memory worth a word."""


@dataclass(slots=True)
class Rounding:
    """How much of the adapters' change is left in weights of 16 bits, over all weights that were merged.

    `change_squared` is the squared norm of the exact change, `weights_squared` that of the weights, `kept`
    the product of the exact change with the one that is left.
    """

    change_squared: float = 0.0
    weights_squared: float = 0.0
    kept: float = 0.0

    def add(self, before: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count one weight: as it was, with the change in float32, and as it is written."""
        parts = (tensor.reshape(-1).split(_PART) for tensor in (before, merged, rounded))
        for old, new, written in zip(*parts, strict=True):
            old = old.double()
            change = new.double() - old
            self.change_squared += float(change.dot(change))
            self.weights_squared += float(old.dot(old))
            self.kept += float(change.dot(written.double() - old))

    @property
    def share(self) -> float:
        """What of the change is left along its own direction: 1 is all, 0 nothing."""
        return self.kept / self.change_squared if self.change_squared else 0.0

    @property
    def size(self) -> float:
        """Norm of the change beside that of the weights."""
        return (self.change_squared / self.weights_squared) ** 0.5 if self.weights_squared else 0.0


@dataclass(slots=True)
class Adapters:
    """Adapters of one base, each with its weight; `layers` are PEFT's by the parameter that they change."""

    folders: Sequence[AdapterFolder]
    weights: Sequence[float]
    layers: Mapping[str, Any] = field(init=False, default_factory=dict)

    def attach(self, base: BaseFolder) -> Adapters:
        """Load the adapters onto an empty model of the base, in float32.

        Raises:
            InputError: an adapter was trained on other shapes or modules, or changes a tensor that the
                embedding and the output head share.
        """
        import torch
        from peft import get_peft_model

        model: Any = hollow_model(base)
        for index, folder in enumerate(self.folders):
            name = adapter_name(index)
            _refuse_changed_weights(folder, base)
            try:
                if index == 0:
                    model = get_peft_model(model, folder.config, adapter_name=name, low_cpu_mem_usage=True)
                result = model.load_adapter(
                    str(folder.path), name, torch_device="cpu", low_cpu_mem_usage=True
                )
            except (RuntimeError, ValueError, KeyError, TypeError, NotImplementedError) as error:
                raise InputError(f"{folder.path}: it does not fit {base.name}: {_reason(error)}") from error
            unused, absent = list(result.unexpected_keys), list(result.missing_keys)
            if unused or absent:
                what = f"no place for {shorten(unused[0])}" if unused else f"{shorten(absent[0])} is missing"
                raise InputError(f"{folder.path}: it does not fit {base.name}: {what}")
        with torch.no_grad():
            self.layers = dict(self._found(model))
        _refuse_tied(model, self.layers, self.folders[0].path)
        return self

    def _found(self, model: torch.nn.Module) -> list[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        found = []
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for index, weight in enumerate(self.weights):
                layer.set_scale(adapter_name(index), weight)
            module = path.removeprefix(_PREFIX).replace(".base_layer", "")
            found.append((f"{module}.{_parameter(layer)}", layer))
        return found

    def merge(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of a parameter with all adapters merged into it by PEFT, in float32.

        Raises:
            InputError: the result is not finite.
        """
        import torch

        layer = self.layers[parameter]
        owner, name = layer.get_base_layer(), _parameter(layer)
        hollow = owner._parameters[name]
        owner._parameters[name] = torch.nn.Parameter(weight.float().clone(), requires_grad=False)
        try:
            with torch.no_grad():
                names = [adapter_name(index) for index in range(len(self.folders))]
                layer.merge(safe_merge=False, adapter_names=names)
            merged: torch.Tensor = owner._parameters[name].data
        finally:
            owner._parameters[name] = hollow
            layer.merged_adapters.clear()
        if not torch.isfinite(merged).all():
            raise InputError(f"{self.folders[0].path}: merged into {parameter} it is not finite")
        return merged


def adapter_name(index: int) -> str:
    """What PEFT calls the adapter of a place in the order."""
    return f"adapter_{index}"


def hollow_model(base: BaseFolder) -> torch.nn.Module:
    """The model with weights on the CPU that take no memory: one zero, seen in the shape of each weight.

    PEFT puts the adapter of an expert onto the device of its base, where the meta device would lose it
    (peft/tuners/lora/layer.py, ParamWrapper._move_adapter_to_device_of_base_layer).
    """
    import torch

    model = empty_model(model_config(base), torch.float32)
    zero = torch.zeros(())
    known: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                new = torch.nn.Parameter(zero.expand(value.shape), requires_grad=False)
                module._parameters[name] = known.setdefault(id(value), new)
    return model


def _parameter(layer: Any) -> str:
    return str(getattr(layer, "parameter_name", "weight"))


def _refuse_changed_weights(folder: AdapterFolder, base: BaseFolder) -> None:
    """A whole weight beside an adapter is a copy of the base's, or was changed and would be lost."""
    import torch
    from safetensors import safe_open

    with safe_open(folder.path / WEIGHTS, framework="pt") as own:
        for name in folder.whole:
            stored = base.tensors.get(name.removeprefix(_PREFIX).replace(".base_layer", ""))
            value = own.get_tensor(name)
            if stored is not None and stored.shape == tuple(value.shape):
                with safe_open(stored.file, framework="pt") as file:
                    theirs = file.get_tensor(name.removeprefix(_PREFIX).replace(".base_layer", ""))
                if torch.equal(theirs.to(value.dtype), value):
                    continue
            raise InputError(
                f"{folder.path}: {shorten(name)} is a whole weight and not the base's (a resized vocabulary, "
                "or a module trained whole); a merge would lose it"
            )


def _refuse_tied(model: Any, layers: Mapping[str, Any], path: Any) -> None:
    """An adapter on one of two modules that share a weight would change both."""
    base = model.get_base_model()
    config = base.config
    # Qwen2.5-VL's text config does not say it, but the whole's does.
    if not getattr(config.get_text_config(), "tie_word_embeddings", config.tie_word_embeddings):
        return
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        for parameter, layer in layers.items():
            if layer is module:
                raise InputError(
                    f"{path}: it adapts {parameter}, which embedding and output head share; merged it would "
                    "change both"
                )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mismatch = next((line for line in lines if line.startswith("size mismatch")), None)
    return shorten(mismatch or (lines[0] if lines else type(error).__name__), 200)
