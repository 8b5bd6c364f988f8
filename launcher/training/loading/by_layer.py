"""A model that is loaded a few tensors at a time: whose experts are quantised one layer at a time, or whose
stored experts are dequantised so.

transformers' own loader makes whole 16-bit experts on the GPU before anything could quantise them, which is
what 4 bits are to avoid. Here a few tensors are read at a time, stacks of experts on the host, so that the
GPU never holds more than one of them in 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.training.loading.base_folder import BaseFolder
from launcher.training.loading.quantised_experts import is_stack, quantise
from launcher.training.loading.skeleton import Group, Skeleton, model_config, shaped_model
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def load_by_layer(
    base: BaseFolder,
    *,
    dtype: torch.dtype,
    quantization_config: BitsAndBytesConfig | None,
    quantizes_experts: bool,
    attn_implementation: str | None,
    device: torch.device,
) -> PreTrainedModel:
    """The model of a base on a device: with `quantization_config` linear layers in 4 bits, as by
    transformers, and where `quantizes_experts` stacks of experts.

    Raises:
        InputError: a weight is missing, or the loader refuses it.
    """
    skeleton = Skeleton(base, dtype, quantization_config, device)
    try:
        model = shaped_model(
            model_config(base),
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
        )
        for group in skeleton.groups:
            if group.parameters:
                experts = quantization_config if quantizes_experts else None
                _load(model, skeleton, group, experts, device)
    finally:
        skeleton.close()
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise InputError(f"{base.name}: it has no weight {missing[0]}")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def _load(
    model: PreTrainedModel,
    skeleton: Skeleton,
    group: Group,
    experts: BitsAndBytesConfig | None,
    device: torch.device,
) -> None:
    """Read a group's tensors and put what they make into the model, stacks quantised as `experts` says."""
    import bitsandbytes as bnb
    import torch

    tensors = dict(model.named_parameters())
    stacked = any(name in tensors and is_stack(name, tensors[name]) for name in group.parameters)
    loaded = skeleton.load_onto(group, torch.device("cpu") if stacked else device)
    while loaded:
        name, value = loaded.popitem()
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._buffers:
            module._buffers[key] = value.data
            continue
        value.requires_grad_(module._parameters[key].requires_grad)
        if is_stack(name, value):
            stack = torch.nn.Parameter(value.data.contiguous().to(device), requires_grad=False)
            del value
            if experts is None:
                module.register_parameter(key, stack)
            else:
                quantise(module, key, stack, experts)
            continue
        module.register_parameter(key, value)
        if isinstance(value, bnb.nn.Params4bit):
            value.module, module.quant_state = module, value.quant_state
