"""Build a model of published shapes with random weights, quantised layer by layer, without a checkpoint.

Memory and speed depend on shapes and dtypes alone, so a run with random weights measures what the real
model would (stack-level check: a folder loaded by from_pretrained and a model filled in place agree to 0.1%).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

    from launcher.training.several.sharded_model import Fill, Slot

WEIGHT_STD = 0.02


def build_random_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    quantization_config: BitsAndBytesConfig | None,
    quantizes_experts: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Return the causal language model of `config` on `device`, its weights random.

    With `quantization_config` the linear layers that transformers would quantise hold NF4/FP4 weights; the
    model is marked as transformers marks a model it loaded in 4 bits, so PEFT and TRL treat it alike. With
    `quantizes_experts` stacks of experts do too, as launcher/training/loading/by_layer.py has them.
    Peak memory while building is the finished model plus one 16-bit weight.
    """
    import torch

    from launcher.training.loading.quantised_experts import is_stack, quantise
    from launcher.training.loading.skeleton import shaped_model

    model = shaped_model(
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    generator = torch.Generator(device=device).manual_seed(seed)
    filled: dict[int, torch.nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in filled:
                module.register_parameter(name, filled[id(parameter)])
                continue
            new = _random_parameter(module, name, parameter, dtype, device, generator)
            if quantization_config is not None and quantizes_experts and is_stack(name, parameter):
                quantise(module, name, new, quantization_config)
                continue
            filled[id(parameter)] = new
            module.register_parameter(name, new)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
            )
    model.tie_weights()
    return model


def random_filling(dtype: torch.dtype, seed: int = 0) -> Fill:
    """Fills a hollow model (launcher/training/several/sharded_model.py) as build_random_model fills one."""
    import torch

    generators: dict[torch.device, torch.Generator] = {}

    def fill(slots: Sequence[Slot], device: torch.device) -> dict[str, torch.nn.Parameter]:
        generator = generators.setdefault(device, torch.Generator(device=device).manual_seed(seed))
        return {
            slot.name: _random_parameter(slot.module, slot.key, slot.hollow, dtype, device, generator)
            for slot in slots
        }

    return fill


def _random_parameter(
    module: torch.nn.Module,
    name: str,
    parameter: torch.nn.Parameter,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> torch.nn.Parameter:
    import bitsandbytes as bnb
    import torch

    if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
        values = torch.empty((module.out_features, module.in_features), dtype=dtype, device=device)
        values.normal_(std=WEIGHT_STD, generator=generator)
        quantized = bnb.nn.Params4bit(
            values,
            requires_grad=False,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            module=module,
        )
        return quantized._quantize(device)
    values = torch.empty(parameter.shape, dtype=dtype, device=device)
    if "norm" in type(module).__name__.lower():
        values.fill_(1.0)
    else:
        values.normal_(std=WEIGHT_STD, generator=generator)
    return torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
