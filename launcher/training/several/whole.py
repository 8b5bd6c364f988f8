"""Shards put together for files, and files cut into shards: weights, and the optimizer's state.

What is written has the form that one process writes, so that a run can go on with any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has sharded a model."""
    return isinstance(model, FSDPModule)


def trained_weights(model: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """What is trained, whole and on the CPU, one tensor after the other; empty where `keep` is false.

    Every rank must ask at the same place.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = _whole(parameter.detach(), keep=keep)
        if value is not None:
            found[name] = value
    return found


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """The optimizer's state_dict with whole tensors on the CPU; states are left out where `keep` is false."""
    told = optimizer.state_dict()
    state = {
        index: {
            name: _whole(value, keep=keep) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        for index, values in told["state"].items()
    }
    return {"state": state, "param_groups": told["param_groups"]} if keep else {}


def load_optimizer_state(optimizer: torch.optim.Optimizer, whole: Mapping[str, Any]) -> None:
    """Give a sharded optimizer its part of a whole state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: _shard_like(value, parameters[index]) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        for index, values in whole["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter, sharded or not, a whole value."""
    with torch.no_grad():
        parameter.copy_(_shard_like(value.to(parameter.dtype), parameter))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor: the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
    """The whole of a tensor on the CPU of the rank that keeps it, the first; gathered over the CPU, since a
    GPU that is full has no room for it.
    """
    if not isinstance(value, DTensor):
        # A copy: the CPU's own tensors would be trained on while they are written.
        return value.detach().to("cpu", copy=True) if keep else None
    if value.placements != (Shard(0),):
        raise NotImplementedError(f"a tensor that is not sharded by rows: {value.placements}")
    own, count = value.to_local().detach().cpu(), value.device_mesh.size()
    rows = -(-value.shape[0] // count)
    padded = own.new_zeros((rows, *value.shape[1:]))
    padded[: len(own)] = own
    # As bytes: gloo need not know the dtype.
    sent = padded.view(-1).view(torch.uint8)
    parts = [torch.empty_like(sent) for _ in range(count)] if keep else None
    dist.gather(sent, parts, dst=0)
    if parts is None:
        return None
    return torch.cat(parts).view(value.dtype).view(rows * count, *value.shape[1:])[: value.shape[0]]


def _shard_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Every rank has read the file: nothing is sent.
    moved = value.to(like.to_local().device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's wrapper."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
