"""A model that is sharded while it is loaded: each layer quantised, sharded at once, its rest freed.

The most that a GPU holds meanwhile is its shards and one whole layer. Adapters are there before the weights
are, drawn by PEFT on the CPU in the order in which it draws them on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch.distributed.tensor import DTensor

from launcher.training.callbacks import decoder_layers
from launcher.training.loading.skeleton import shaped_model
from launcher.training.several.host_embedding import keep_on_host
from launcher.training.several.units import Units
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter of the base belongs: its name in the bare model, its module and its name there."""

    name: str
    module: torch.nn.Module
    key: str
    hollow: torch.nn.Parameter

    def put(self, value: torch.nn.Parameter) -> None:
        """Put a loaded parameter there."""
        value.requires_grad_(self.hollow.requires_grad)
        self.module.register_parameter(self.key, value)
        if isinstance(value, bnb.nn.Params4bit):
            value.module, self.module.quant_state = self.module, value.quant_state


Fill = Callable[[Sequence[Slot], torch.device], Mapping[str, torch.nn.Parameter]]
"""Loads parameters onto a device, by their names."""


def hollow_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    quantization_config: Any | None,
) -> PreTrainedModel:
    """The causal language model of a config whose parameters have shapes and no memory; buffers are real.

    With `quantization_config` its linear layers are bitsandbytes', as transformers would make them.
    """
    model = shaped_model(
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    _hollow(model)
    return model


def _hollow(model: torch.nn.Module) -> None:
    """Parameters on the CPU that take no memory: PEFT puts adapters where the weights are, and on the meta
    device it would forget what it has drawn.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                data = torch.empty(parameter.shape, dtype=parameter.dtype)
                data.untyped_storage().resize_(0)
                made[id(parameter)] = _alike(parameter, data, module)
            module.register_parameter(name, made[id(parameter)])


def _alike(parameter: torch.nn.Parameter, data: torch.Tensor, module: Any) -> torch.nn.Parameter:
    if not isinstance(parameter, bnb.nn.Params4bit):
        return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
    return bnb.nn.Params4bit(
        data,
        requires_grad=False,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
        module=module,
    )


def adapted(model: PreTrainedModel, setup: TrainingSetup, seed: int) -> torch.nn.Module:
    """The model with its adapters, as TRL's trainer would make them (trl/trainer/sft_trainer.py)."""
    from peft import get_peft_model
    from transformers import set_seed

    from launcher.training.adapters import lora_config

    # TRL sets the seed before the model is built, and PEFT is the first to draw.
    set_seed(seed)
    config = lora_config(setup)
    if config is None:
        return model
    wrapped: torch.nn.Module = get_peft_model(model, config)
    if setup.method == "qlora":
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return wrapped


def shard_while_filling(
    model: torch.nn.Module, fill: Fill, units: Units, device: torch.device
) -> torch.nn.Module:
    """Fill a hollow model layer by layer, each made a unit of FSDP2 as soon as it is there; returns it.

    A frozen embedding stays in the host's memory and a frozen head whole on every GPU; tied, both are one
    tensor on the GPU.
    """
    for prefix, layer in _named_layers(model):
        _fill(layer, prefix, fill, device)
        units.layer(layer)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained, tied = embedding.weight.requires_grad, embedding.weight is head.weight
    on_host = not (trained or tied)
    if on_host:
        _fill(embedding, _path_of(model, embedding), fill, torch.device("cpu"))
        keep_on_host(embedding, device)
    _fill(model, "", fill, device)
    if trained:
        units.trained_ends(embedding, _final_norm(model), head)
        units.root(model, set())
    else:
        units.root(model, {embedding.weight, head.weight})
    if on_host:
        embedding.to("cpu")
    return model


def _named_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(layer)], layer) for layer in decoder_layers(model)]


def _path_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _fill(part: torch.nn.Module, prefix: str, fill: Fill, device: torch.device) -> None:
    """Give all hollow parameters of a part of the model their values, and move its adapters to the device."""
    hollow: dict[int, Slot] = {}
    sharing: list[tuple[Slot, int]] = []
    for path, module in part.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if parameter.untyped_storage().size() or not parameter.numel():
                if parameter.device != device and parameter.requires_grad:
                    parameter.data = parameter.data.to(device)
                continue
            slot = Slot(_bare(".".join(filter(None, (prefix, path, key)))), module, key, parameter)
            hollow.setdefault(id(parameter), slot)
            sharing.append((slot, id(parameter)))
    values = fill(list(hollow.values()), device)
    for slot, shared in sharing:
        slot.put(values[hollow[shared].name])


def _bare(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _final_norm(model: torch.nn.Module) -> torch.nn.Module | None:
    """The norm behind the layers, by accelerate's rule (accelerate/utils/fsdp_utils.py, _find_final_norm)."""
    base = getattr(model, model.base_model_prefix)
    norms = [module for module in base.children() if "Norm" in type(module).__name__]
    return norms[-1] if norms else None
