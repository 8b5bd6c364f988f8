"""The GPU of a training process: chosen, made the only visible one, and what a record says of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.runs.allocator import process_allocator
from launcher.runs.training_job import TrainingJob
from launcher.training.several.ranks import ALONE, Ranks
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ChosenGpu:
    """The GPU of this run, as NVML sees it, and what was in use on it before this process took any."""

    name: str
    uuid: str
    used_before_bytes: int

    def used_since_start(self) -> int | None:
        """What is used on the GPU beyond what was before; None if the driver stopped answering."""
        from planner.gpus.detect import NoGpuError, local_gpus

        try:
            used = next((gpu.used_bytes for gpu in local_gpus() if gpu.uuid == self.uuid), None)
        except NoGpuError:
            return None
        return None if used is None else max(0, used - self.used_before_bytes)

    def room(self) -> int | None:
        """What other processes leave of the GPU now; None where the driver does not tell them apart."""
        from planner.gpus.detect import NoGpuError, local_gpus

        try:
            gpu = next((gpu for gpu in local_gpus() if gpu.uuid == self.uuid), None)
        except NoGpuError:
            return None
        own = None if gpu is None else next((one for one in gpu.processes if one.pid == os.getpid()), None)
        if gpu is None or own is None or own.used_bytes is None:
            return None
        return max(0, gpu.free_bytes + own.used_bytes)


def choose_gpu(job: TrainingJob, ranks: Ranks = ALONE) -> ChosenGpu | None:
    """Make the job's GPUs the only visible ones and return this rank's; None when NVML shows none (torch then
    decides). All of this machine's ranks see the same: NCCL moves data from GPU to GPU.
    """
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        gpus = local_gpus()
    except NoGpuError:
        return None
    wanted = gpus[job.gpu_index : job.gpu_index + job.local_processes]
    if len(wanted) < job.local_processes:
        last = job.gpu_index + job.local_processes - 1
        raise InputError(f"gpu_index={last}: only {len(gpus)} GPUs are visible")
    gpu = wanted[ranks.local_rank]
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(one.uuid for one in wanted)
    return ChosenGpu(gpu.spec.name, gpu.uuid, gpu.used_bytes)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a GPU or this processor has units for bfloat16.

    A processor without takes some hundred times as long for a product in bfloat16 as for one in float32
    (torch 2.13: aten/src/ATen/native/cpu/BlasKernel.cpp multiplies element by element).
    """
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gpu_facts(device: torch.device, gpu: ChosenGpu | None) -> dict[str, str | int | float | None]:
    """What a run record says of the GPU; `context_bytes` is what the driver shows before the model loads."""
    import torch

    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    properties = torch.cuda.get_device_properties(device)
    used = None if gpu is None else gpu.used_since_start()
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_total_bytes": properties.total_memory,
        "allocator": process_allocator(os.environ),
        "context_bytes": None if used is None else max(0, used - torch.cuda.memory_reserved(device)),
    }
