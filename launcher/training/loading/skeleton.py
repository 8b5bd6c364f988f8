"""A base model without weights, into which transformers' own loader puts a few at a time.

What a checkpoint calls a tensor, how stacked experts are put together from many of them, what bitsandbytes
quantises and how: all of it is the loader's and the quantiser's business, as it was when the run was loaded.
Only what a few tensors need is in memory. The functions used are those that PEFT builds its own loading on
(peft/utils/transformers_weight_conversion.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.training.loading.base_folder import BaseFolder
from launcher.training.loading.dequantised import DequantisedSlice, dequantised_from_int8
from launcher.training.loading.microscaled import MicroscaledSlice, is_microscaled
from launcher.training.loading.quantised_experts import is_stack, quantised
from launcher.training.loading.stored_tensor import StoredTensor
from launcher.training.loading.tower import tower_paths
from planner.base.errors import InputError, shorten

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tensors of the checkpoint that make parameters of the model together; none for what it does not use."""

    sources: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(slots=True)
class _Place:
    """Where a parameter or buffer hangs, and what hangs there while nothing is loaded."""

    holder: dict[str, Any]
    key: str
    empty: Any


@dataclass(slots=True)
class Skeleton:
    """The model of a base folder on the meta device; with `quantization` as bitsandbytes holds it, and with
    `quantizes_experts` as launcher/training/loading/quantised_experts.py holds stacks of experts.
    """

    base: BaseFolder
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None
    device: torch.device
    quantizes_experts: bool = False
    model: PreTrainedModel = field(init=False)
    groups: tuple[Group, ...] = field(init=False)
    _quantizer: Any = field(init=False, default=None)
    _conversions: list[Any] = field(init=False)
    _places: dict[str, _Place] = field(init=False)
    _files: ExitStack = field(init=False, default_factory=ExitStack)
    _opened: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        config = model_config(self.base)
        self.model = empty_model(config, self.dtype)
        if self.quantization is not None:
            from transformers.quantizers import AutoHfQuantizer

            config.quantization_config = self.quantization
            self._quantizer = AutoHfQuantizer.from_config(self.quantization, pre_quantized=False)
            self._quantizer.preprocess_model(
                model=self.model, dtype=self.dtype, device_map={"": self.device}, checkpoint_files=None
            )
        self._conversions = get_model_conversion_mapping(self.model, None, self._quantizer)
        self._places = dict(_places(self.model))
        self.groups = _groups(self.model, self.base.tensors, self._conversions)

    def close(self) -> None:
        """Close the shards."""
        self._opened.clear()
        self._files.close()

    def load(self, group: Group) -> dict[str, torch.Tensor]:
        """A group's parameters by their names in the model, in the dtype that a run has them in.

        Quantised ones are dequantised to what the forward pass multiplies by.
        """
        loaded = self.load_onto(group, self.device)
        return {name: self._plain(name, value) for name, value in loaded.items()}

    def load_onto(self, group: Group, device: torch.device) -> dict[str, torch.nn.Parameter]:
        """A group's parameters by their names in the model, on a device, as a run holds them.

        Raises:
            InputError: the loader refuses them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        loading = LoadStateDictConfig(
            device_map={"": device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=self._quantizer,
            weight_mapping=self._conversions,
            use_safetensors=True,
        )
        stored = {name: self._slice(name) for name in group.sources}
        info, _ = convert_and_load_state_dict_in_model(self.model, stored, loading)
        problems = [*info.conversion_errors.values(), *info.error_msgs]
        problems += [
            f"{name} is {tuple(found)}, not {tuple(asked)}" for name, found, asked in info.mismatched_keys
        ]
        loaded = {}
        for name, place in self._places.items():
            value = place.holder[place.key]
            if value is not place.empty:
                loaded[name] = value
                place.holder[place.key] = place.empty
        if problems or not loaded:
            what = problems[0] if problems else "nothing was loaded"
            raise InputError(f"{self.base.name}: {group.sources[0]}: {shorten(str(what), 120)}")
        return loaded

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the checkpoint."""
        value: torch.Tensor = self._slice(name)[...]
        return value

    def as_stored(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A group's parameters as the checkpoint names and cuts them: the group must be the last one loaded.

        Raises:
            InputError: transformers does not write the group as it reads it.
        """
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(tensors))
        if set(found) != set(group.sources):
            other = min(set(found) ^ set(group.sources))
            raise InputError(
                f"{self.base.name}: transformers reads {shorten(other)} but does not write it back"
            )
        return found

    def is_quantized(self, parameter: str) -> bool:
        """Whether a run has the parameter in 4 bits."""
        if self._quantizer is None:
            return False
        return self._is_quantized_stack(parameter) or bool(
            self._quantizer.param_needs_quantization(self.model, parameter)
        )

    def _is_quantized_stack(self, parameter: str) -> bool:
        if self.quantization is None or not self.quantizes_experts:
            return False
        return is_stack(parameter, self._places[parameter].empty)

    def _plain(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A loaded parameter as a plain tensor on the CPU."""
        from bitsandbytes.functional import dequantize_4bit

        if self.quantization is not None and self._is_quantized_stack(name):
            return dequantize_4bit(*quantised(value.data, self.quantization)).cpu()
        scales = getattr(value, "SCB", None)
        if scales is not None:
            return dequantised_from_int8(value.data, scales, self.dtype).cpu()
        state = getattr(value, "quant_state", None)
        if state is None:
            return value.detach().cpu()

        # Then cast to the inputs' dtype, as in MatMul4Bit.forward (bitsandbytes/autograd/_functions.py).
        return dequantize_4bit(value.data, state).to(self.dtype).cpu()

    def _slice(self, name: str) -> Any:
        tensor = self.base.tensors[name]
        if is_microscaled(name, tensor):
            blocks, scales = (self._slice_in(part, file) for part, file in tensor.parts)
            return MicroscaledSlice(tensor=tensor, blocks=blocks, scales=scales, dtype=self.dtype)
        found = self._slice_in(name, tensor.file)
        if tensor.held_bytes is None:
            return found
        constants = {part: self._slice_in(part, file) for part, file in tensor.parts}
        return DequantisedSlice(name=name, tensor=tensor, packed=found, constants=constants, dtype=self.dtype)

    def _slice_in(self, name: str, path: Path) -> Any:
        from safetensors import safe_open

        file = str(path)
        if file not in self._opened:
            self._opened[file] = self._files.enter_context(safe_open(file, framework="pt"))
        return self._opened[file].get_slice(name)


def model_config(base: BaseFolder) -> PretrainedConfig:
    """The config of a base folder as transformers reads it.

    Raises:
        InputError: the installed transformers knows no such model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{base.name}: transformers refuses its config: {shorten(str(error), 120)}"
        ) from error
    if hasattr(config, "quantization_config"):
        # Its tensors are given as what they stand for.
        del config.quantization_config
    return config


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a config, or the vision-language model of one, on the meta device.

    Raises:
        InputError: transformers has none for it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if tower_paths(config) else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"transformers cannot build the base model: {shorten(str(error), 120)}") from error


def shaped_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    quantization_config: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    """The model of a config with parameters on the meta device, to be put in their places: a causal language
    model, or where it has a vision config the whole.

    With `quantization_config` its linear layers are bitsandbytes', as transformers would make them, and it is
    marked as a model that was loaded so.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from launcher.training.several.quantised import mark_as_quantized

    kind = AutoModelForImageTextToText if tower_paths(config) else AutoModelForCausalLM
    # Buffers (rotary frequencies, embedding scales) are computed at construction: only parameters are meta.
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(
            config,
            dtype=dtype,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    if quantization_config is not None:
        mark_as_quantized(model, quantization_config)
    # A tied head is one tensor from the start, as when a checkpoint is loaded.
    model.tie_weights()
    return model


def _places(model: torch.nn.Module) -> list[tuple[str, _Place]]:
    found = []
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, value in holder.items():
                if value is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    found.append((name, _Place(holder, key, value)))
    return found


def _groups(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor], conversions: list[Any]
) -> tuple[Group, ...]:
    """Which tensors go together, by the same rules as the loader's (core_model_loading.py)."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known = model.state_dict()
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    targets_of = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    found: dict[str, Group] = {}
    for name in sorted(tensors, key=dot_natural_key):
        prefix = model.base_model_prefix
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if renamed not in known:
            found[name] = Group(sources=(name,), parameters=())
            continue
        parameters = [renamed]
        if pattern is not None:
            first, *others = targets_of[pattern]
            parameters += [renamed.replace(first, other) for other in others]
        group = found.setdefault(renamed, Group(sources=(), parameters=tuple(parameters)))
        found[renamed] = replace(group, sources=(*group.sources, name))
    return tuple(found.values())
