"""NCCL's memory: buffers of its channels, which the driver shows and torch's allocator does not."""

from __future__ import annotations

from planner.base.units import MIB
from planner.gpus.links import BOARD, link_of
from planner.gpus.spec import GpuSpec
from planner.memory.measured.cuda_terms import NO_NCCL, NcclMemory
from planner.setup.run import TrainingRun

EXPECTED_BYTES = 286 * MIB
"""Two H200s joined by NVLink, after the first step: 282 MiB with FSDP2, 286 with DDP, beside the 802 MiB that
one has outside the allocator."""
MEASURED_CAPABILITY = (9, 0)
MEASURED_SPREAD_BYTES = 48 * MIB
"""What those 802 MiB are above the context of other runs on an H200 (769), and the 4 MiB between the two."""
TWO_UPPER_BYTES, MORE_UPPER_BYTES = 544 * MIB, 688 * MIB
"""Two, and three or four, A100s joined by NVLink (https://github.com/NVIDIA/nccl/issues/964)."""
MANY, MANY_UPPER_BYTES = 4, 1060 * MIB
"""Eight H100s (https://github.com/NVIDIA/nccl/issues/1685, with a process's context in it)."""


FEW_CHANNELS_BYTES_PER_SECOND = 100e9
"""NVLink below which the channels are fewer than those measured: memory is in proportion to channels, and
these to the bandwidth (https://github.com/NVIDIA/nccl/issues/986)."""


def nccl_memory(run: TrainingRun, gpu: GpuSpec | None) -> NcclMemory:
    """What a run's collectives hold on each GPU: as much as was measured, of which PCIe needs less."""
    parallelism = run.parallelism
    if parallelism.is_single:
        return NO_NCCL
    count, link = parallelism.num_processes, None if gpu is None else link_of(gpu.id)
    two = count == 2
    if link is not None and (link.nvlink_bytes_per_second or 0.0) < FEW_CHANNELS_BYTES_PER_SECOND:
        return NcclMemory(EXPECTED_BYTES, 0 if two else MORE_UPPER_BYTES - TWO_UPPER_BYTES)
    measured = gpu is not None and gpu.compute_capability == MEASURED_CAPABILITY
    if two and measured and link is not None and link.nvlink == BOARD:
        return NcclMemory(EXPECTED_BYTES, MEASURED_SPREAD_BYTES)
    upper = TWO_UPPER_BYTES if two else MORE_UPPER_BYTES if count <= MANY else MANY_UPPER_BYTES
    return NcclMemory(EXPECTED_BYTES, upper - EXPECTED_BYTES)
