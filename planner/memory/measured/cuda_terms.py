"""Memory of CUDA and its libraries that no formula counts, from torch's sources and measured runs."""

from __future__ import annotations

from typing import NamedTuple

from planner.base.units import MIB
from planner.gpus.spec import GpuSpec
from planner.setup.training_setup import TrainingSetup

CUBLAS_WORKSPACE_BYTES = 4096 * 2 * 1024 + 16 * 8 * 1024
"""Default cuBLAS workspace before Hopper: 2 blocks of 4,096 KiB and 8 of 16 KiB (torch
aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize)."""
CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
CUBLASLT_WORKSPACE_BYTES = MIB
"""What cuBLASLt, which computes a Linear with a bias, holds for each thread that has run one (torch
aten/src/ATen/cuda/CUDABlas.cpp, _parseChosenWorkspaceSize: 1,024 KiB; runs 20261122-f5218e78a4e2 and
20261122-e53f3ebb89d1 hold two, 20261122-fc2d4f1e2d32 without checkpointing one)."""
TUNING_BUFFER_BYTES = 50 * MIB
"""The H100's level-2 cache (torch/_inductor/runtime/benchmarking.py, get_device_cache_size)."""
CUBLAS_HANDLES = 2
"""The main thread's handle and the autograd thread's: 64 MiB appear in the first step on an H100."""
MANAGED_CHUNK_BYTES = 128 * MIB
"""The driver's figure grows by multiples of this with a paged optimizer's state (seen on an H100)."""
OFFLOADING_CONTEXT_BYTES = 74 * MIB
"""What a process's first step with activation offloading adds to the context: the copies' stream and pinned
memory (70 to 76 MiB: 20261122-b0e74eb4f158, 20261122-89fd0ba862eb, 20261122-96ee85ceb8ff,
20261122-01e4e7e6d103)."""


class NcclMemory(NamedTuple):
    """What NCCL holds of a GPU: bytes that are expected, and how many more there may be."""

    expected_bytes: int
    spread_bytes: int


NO_NCCL = NcclMemory(0, 0)


def offloading_context_bytes(setup: TrainingSetup) -> int:
    """What a setup's offloading adds to the context."""
    return OFFLOADING_CONTEXT_BYTES if setup.activation_offloading else 0


def managed_process_bytes(managed_bytes: int) -> int:
    """What the driver shows for managed memory of that size: it is held in chunks."""
    return -(-managed_bytes // MANAGED_CHUNK_BYTES) * MANAGED_CHUNK_BYTES


def workspace_block_bytes(gpu: GpuSpec | None) -> int:
    """torch's default for one handle's workspace (unknown GPU: the larger)."""
    before_hopper = gpu is not None and gpu.compute_capability is not None and gpu.compute_capability < (9, 0)
    return CUBLAS_WORKSPACE_BYTES if before_hopper else CUBLAS_WORKSPACE_HOPPER_BYTES


def tuning_buffer_bytes(gpu: GpuSpec | None) -> int:
    """What inductor takes to time a new kernel: the level-2 cache's size (unknown GPU: the H100's)."""
    known = None if gpu is None else gpu.l2_cache_bytes
    return TUNING_BUFFER_BYTES if known is None else known
