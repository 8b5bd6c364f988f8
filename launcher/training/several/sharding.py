"""A setup's model as FSDP2 shards it, whatever fills it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh

from launcher.training import build
from launcher.training.several.sharded_model import Fill, adapted, hollow_model, shard_while_filling
from launcher.training.several.units import Units
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def sharded_model(
    setup: TrainingSetup, config: PretrainedConfig, fill: Fill, *, device: torch.device, seed: int
) -> torch.nn.Module:
    """The model of a config with a setup's adapters, sharded over all ranks while `fill` fills it.

    Every rank must ask at the same place, within a process group.
    """
    dtype = build.torch_dtype(setup)
    model = hollow_model(
        config,
        dtype=dtype,
        attn_implementation=setup.attn_implementation,
        quantization_config=build.quantization_config(setup),
    )
    mesh = init_device_mesh(device.type, (setup.num_processes,), mesh_dim_names=("ranks",))
    return shard_while_filling(adapted(model, setup, seed), fill, Units.of(setup, mesh, dtype), device)
