"""Several ranks on one GPU, for measuring memory where there is no second one: NCCL refuses to have two ranks
on a GPU, so that what they exchange goes over the host by gloo.

torch's FSDP2 and DDP allocate what they would with NCCL; that of NCCL itself is not there.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as _collectives


def prepare() -> None:
    """Have FSDP2's collectives and the trainer's go over the host."""
    from launcher.training import arguments

    # Else accelerate gives DDP the GPU of the rank's number.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    told = arguments.several_gpus

    def with_gloo(setup: Any) -> dict[str, Any]:
        found = told(setup)
        return {**found, "ddp_backend": "gloo"} if found else found

    arguments.several_gpus = with_gloo
    _collectives.DefaultAllGather.__call__ = _gather  # type: ignore[method-assign]
    _collectives.DefaultReduceScatter.__call__ = _reduce_scatter  # type: ignore[method-assign]


def _gather(
    comm: Any,
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: dist.ProcessGroup,
    async_op: bool = False,
) -> None:
    """FSDP2's all-gather through pinned host memory, in the order of the current stream."""
    output, own = output_tensor, input_tensor
    count = dist.get_world_size(group)
    mine = _to_host(own.reshape(-1).view(torch.uint8))
    every = torch.empty(count, mine.numel(), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    output.reshape(-1).view(torch.uint8).copy_(every.view(-1))


def _reduce_scatter(
    comm: Any,
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: dist.ProcessGroup,
    op: Any,
    async_op: bool = False,
) -> None:
    """FSDP2's reduce-scatter through the host, summed in float32."""
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    total = _to_host(input_tensor.reshape(-1)).float()
    dist.all_reduce(total, group=group)
    if op == dist.ReduceOp.AVG:
        total /= count
    output_tensor.reshape(-1).copy_(total.chunk(count)[rank].to(output_tensor.dtype))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    host.copy_(tensor)
    return host
