"""Several ranks on one GPU, for measuring memory where there is no second one: NCCL refuses to have two ranks
on a GPU, so that what they exchange goes over the host by gloo.

torch's FSDP2 and DDP allocate what they would with NCCL; that of NCCL itself is not there.
"""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as _collectives


def prepare() -> None:
    """Have FSDP2's collectives and the trainer's go over the host."""
    from launcher.training import arguments

    # accelerate, transformers and torch's barrier take the GPU of the rank's number on its machine.
    os.environ["LOCAL_RANK"] = "0"
    dist.barrier = _barrier
    told = arguments.several_gpus

    def with_gloo(setup: Any) -> dict[str, Any]:
        found = told(setup)
        return {**found, "ddp_backend": "gloo"} if found else found

    arguments.several_gpus = with_gloo
    _collectives.DefaultAllGather.__call__ = _gather
    _collectives.DefaultReduceScatter.__call__ = _reduce_scatter


def _barrier(*args: Any, **kwargs: Any) -> None:
    """torch's barrier over the host, whatever GPU it is told."""
    dist.all_reduce(torch.zeros(1))


def _gather(
    comm: Any,
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: dist.ProcessGroup,
    async_op: bool = False,
) -> None:
    """FSDP2's all-gather through files that all ranks map, in the order of the current stream."""
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    own = input_tensor.reshape(-1).view(torch.uint8)
    every = output_tensor.view(-1).view(torch.uint8).view(count, own.numel())
    _mapped(own.numel(), rank).copy_(own)
    _barrier()
    for other in range(count):
        every[other].copy_(own if other == rank else _mapped(own.numel(), other))
    _barrier()


@functools.cache
def _mapped(size_bytes: int, rank: int) -> torch.Tensor:
    """What a rank hands to the others, of that size: a file in memory for as long as it is read at once."""
    place = Path(tempfile.gettempdir()) / f"vramwise-{os.environ['MASTER_PORT']}-{size_bytes}-{rank}"
    found = torch.from_file(str(place), shared=True, size=size_bytes, dtype=torch.uint8)
    atexit.register(place.unlink, missing_ok=True)
    return found


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
