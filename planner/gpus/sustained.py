"""What a card sustains of its published rates: matrix work under its power limit, and memory traffic.

Published matrix rates are those of the boost clock. Cards whose tensor cores run at half rate with fp32
accumulation (GeForce, L40) hold that clock and reach all of it; the others are held below by their power.
"""

from __future__ import annotations

import math

from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerAnchor:
    """A card whose large matmul was measured at its power limit: its catalog id, and how many times the work
    a processor of the architecture does at that power.
    """

    gpu: str
    work: float = 1.0


POWER_ANCHORS: dict[tuple[int, int], PowerAnchor] = {
    (7, 0): PowerAnchor(gpu="v100-16gb"),
    # TSMC's 12 nm process, as the V100's; a T4 is measured itself.
    (7, 5): PowerAnchor(gpu="v100-16gb"),
    (8, 0): PowerAnchor(gpu="a100-80gb"),
    (8, 6): PowerAnchor(gpu="rtx-a6000"),
    # "Up to twice the performance per watt" of Ampere's GA10x (NVIDIA Ada GPU architecture white paper).
    (8, 9): PowerAnchor(gpu="rtx-a6000", work=2.0),
    (9, 0): PowerAnchor(gpu="h100-80gb"),
    # The process of Ada (TSMC 4N).
    (12, 0): PowerAnchor(gpu="rtx-a6000", work=2.0),
}
POWER_EXPONENT = 1 / 3
"""Clock against power where voltage falls with the clock: power grows with its third power. V100 at 300 W and
V100S at 250: 95 and 88.9 TFLOPS, an exponent of 0.36 (https://github.com/fanghostt/transformers-benchmarks);
A6000 and A10: 0.28, taking twice the A10's 35.3 in TF32 for its rate in 16 bits (public GitHub files)."""
KNEE_WATTS = 2.0
"""Power of a processor (SM), its share of the board, below which voltage is at its least and the clock falls
with power itself: the T4, 1.75 W each, does 0.50 of a V100's work a processor, at 3.75."""
REACHED_BY_SIMD = 0.755
"""Share of the published fp32 rate that products without tensor cores reach: 50.6 of 67 TFLOPS on an H100
(profiles/calibration/microbenchmarks/h100-80gb.json)."""
TENSOR_CORES = (7, 0)
REACHED_BANDWIDTH = 0.893
"""Share of the published bandwidth that copies reach: 2,991 of 3,350 GB/s on an H100
(profiles/calibration/microbenchmarks/h100-80gb.json). A100 40GB 0.887, RTX 4090 0.914."""
REACHED_BANDWIDTH_OF: dict[tuple[int, int], float] = {(7, 5): 0.749}
"""The same by compute capability where it is another: the T4's 239.6 of 320 GB/s."""


def sustained_matrix_flops_per_second(gpu: GpuSpec) -> float | None:
    """The rate of large 16-bit products, one after the other: as measured, else the published one or what the
    board's power allows, whichever is less. None where nothing is published.
    """
    if gpu.measured_matrix_flops_per_second is not None:
        return gpu.measured_matrix_flops_per_second
    published = gpu.matrix_flops_per_second
    if published is not None and gpu.compute_capability < TENSOR_CORES:
        return published * REACHED_BY_SIMD
    limit = _power_limited(gpu)
    if published is None or limit is None:
        return published
    return min(published, limit)


def sustained_single_flops_per_second(gpu: GpuSpec) -> float | None:
    """The rate of large fp32 products where there is no TF32. How far the board's power holds them back is
    not known: taken halfway, in logarithms, between not at all and as far as 16-bit products. None where
    there is TF32, or nothing is published.
    """
    published, matrix = gpu.single_flops_per_second, gpu.matrix_flops_per_second
    sustained = sustained_matrix_flops_per_second(gpu)
    if published is None or matrix is None or sustained is None:
        return None
    if gpu.compute_capability < TENSOR_CORES:
        return published * REACHED_BY_SIMD
    return published * REACHED_BY_SIMD * math.sqrt(min(1.0, sustained / matrix))


def reached_bandwidth_bytes_per_second(gpu: GpuSpec) -> float | None:
    """Bandwidth that copies reach: as measured, else a share of the published one; None where unknown."""
    if gpu.measured_bandwidth_bytes_per_second is not None:
        return gpu.measured_bandwidth_bytes_per_second
    published = gpu.bandwidth_bytes_per_second
    share = REACHED_BANDWIDTH_OF.get(gpu.compute_capability, REACHED_BANDWIDTH)
    return None if published is None else published * share


def _power_limited(gpu: GpuSpec) -> float | None:
    """What the board's power allows; None where it, or a measured card of the architecture, is not known."""
    anchor = POWER_ANCHORS.get(gpu.compute_capability)
    if anchor is None or gpu.power_watts is None or not gpu.sm_count:
        return None
    card = gpu_catalog().get(anchor.gpu)
    rate, watts, count = card.measured_matrix_flops_per_second, card.power_watts, card.sm_count
    if rate is None or watts is None or not count:
        return None
    slowed = _clock(gpu.power_watts / gpu.sm_count) / _clock(watts / count)
    return rate * anchor.work * gpu.sm_count / count * slowed


def _clock(watts: float) -> float:
    """The clock that a processor holds at that power, beside the one at KNEE_WATTS."""
    share = watts / KNEE_WATTS
    return float(share**POWER_EXPONENT) if share >= 1.0 else share
