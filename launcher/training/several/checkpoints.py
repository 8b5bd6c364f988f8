"""What a checkpoint of several ranks holds: one process's files, and each rank's random numbers.

Gathered first, with all ranks, and written then by rank 0 alone: a disk that is full is waited for without
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launcher.training.several import random_states, whole
from planner.base.errors import InputError


@dataclass(frozen=True, slots=True)
class Gathered:
    """What rank 0 writes: what is trained (sharded models alone), the optimizer's state (so too) and the
    files of all ranks' random numbers.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random_states: dict[str, bytes]


def gather(trainer: Any) -> Gathered:
    """Gather them."""
    keep = trainer.ranks.saves
    weights, optimizer = {}, {}
    if trainer.shards:
        weights = whole.trained_weights(trainer.model, keep=keep)
        optimizer = whole.optimizer_state(whole.innermost(trainer.optimizer), keep=keep)
    told: list[Any] = [None] * trainer.ranks.count
    dist.all_gather_object(told, random_states.as_file(), group=_over_cpu())
    states = {random_states.file_of(rank): content for rank, content in enumerate(told)}
    return Gathered(weights, optimizer, {**states, random_states.ONE_PROCESS: told[0]})


_cpu_group: list[Any] = []


def _over_cpu() -> Any:
    """A group that pickles over the CPU: the default one would take the GPU where there is one."""
    if not _cpu_group:
        _cpu_group.append(dist.new_group(backend="gloo"))
    return _cpu_group[0]


def load_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Give a sharded model what a checkpoint holds of it.

    Raises:
        InputError: the checkpoint is another model's.
    """
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {
        name.replace(".default.", ".") if hasattr(model, "peft_config") else name: name for name in trained
    }
    for name in names.keys() ^ stored.keys():
        raise InputError(f"{folder}: its weight {name} is not one of this model")
    for name, value in stored.items():
        parameter = trained[names[name]]
        if value.shape != parameter.shape:
            raise InputError(f"{folder}: its weight {name} has another shape than this model's")
        whole.put(parameter, value)
