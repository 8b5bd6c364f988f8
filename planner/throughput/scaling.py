"""How many times longer a GPU takes than another by what is published of both, kind of work by kind of work.

The other, whose rates were measured, is Hopper; what differs beside it follows from architecture: products
from the power limit, attention from the kernel that torch picks, dequantisation from processors or memory,
whichever is slower, fp32 from whether there is TF32.
"""

from __future__ import annotations

from planner.gpus.spec import GpuSpec
from planner.gpus.sustained import (
    reached_bandwidth_bytes_per_second,
    sustained_matrix_flops_per_second,
    sustained_single_flops_per_second,
)
from planner.throughput.microbenchmarks import Slowdown
from planner.throughput.torch_attention import FLASH

TF32_SHARE = 0.52
"""TF32's rate beside that of 16 bits: 410 of 789 TFLOPS on an H100 (its microbenchmarks), half as
published."""
DEQUANTISED_PER_SECOND, DEQUANTISED_BY = 7.52e11, 132
"""NF4 elements that bitsandbytes' kernel makes on an H100 a second, and its processors: they bound it, not
memory, for an H200, with the same processors and 1.43 times the bandwidth, makes 1.06 times as many
(microbenchmarks of both)."""
DEQUANTISE_BYTES = 2.7
"""Bytes read and written for an element (traffic.DEQUANTISE), where memory bounds it."""
ATTENTION_SHARE, MASKED_ATTENTION_SHARE = 0.65, 0.365
"""Rate of attention's kernels, forward and backward, beside that of large products, without a mask and with
one (of all pairs): cuDNN's on an H100, 497 of 765 TFLOPS (its microbenchmarks) and the rate fitted to masked
runs. Flash attention from Ampere on is alike: 50 to 73% of an A100's 312 TFLOPS (Dao 2023, arXiv:2307.08691),
0.59 to 0.86 of what its products reach; on Hopper it is half as fast as cuDNN's (2.19 against 4.13 ms, 8 x
2,048)."""
TURING_ATTENTION_SHARE = 0.33
"""The same of the memory-efficient kernels below 8.0, where torch has no other: a kernel that reaches 0.66 of
a T4's tensor cores is 1.95 times as fast where causal, 2.19 times where not
(Dao-AILab/flash-attention#2379)."""


def published_slowdown(gpu: GpuSpec, reference: GpuSpec) -> Slowdown:
    """Compare two GPUs by published figures; null where one is not known. Of the host and of thin products
    nothing is published.
    """
    matrix = _ratio(sustained_matrix_flops_per_second(reference), sustained_matrix_flops_per_second(gpu))
    attention, masked = (
        None if matrix is None else matrix * mine / theirs
        for mine, theirs in zip(_attention_shares(reference), _attention_shares(gpu), strict=True)
    )
    return Slowdown(
        matrix=matrix,
        adapter=None,
        attention=attention,
        masked_attention=masked,
        single=_ratio(_single(reference), _single(gpu)),
        elementwise=_ratio(
            reached_bandwidth_bytes_per_second(reference), reached_bandwidth_bytes_per_second(gpu)
        ),
        dequantized=_ratio(_dequantised(reference), _dequantised(gpu)),
        host_copy=None,
        launch=None,
        quantized_call=None,
    )


def _attention_shares(gpu: GpuSpec) -> tuple[float, float]:
    if gpu.compute_capability < FLASH:
        return TURING_ATTENTION_SHARE, TURING_ATTENTION_SHARE
    return ATTENTION_SHARE, MASKED_ATTENTION_SHARE


def _single(gpu: GpuSpec) -> float | None:
    """The rate of fp32 products as the launcher has them run: by TF32 where there is any."""
    if gpu.compute_capability < FLASH:
        return sustained_single_flops_per_second(gpu)
    matrix = sustained_matrix_flops_per_second(gpu)
    return None if matrix is None else TF32_SHARE * matrix


def _dequantised(gpu: GpuSpec) -> float | None:
    """NF4 elements a second."""
    bandwidth = reached_bandwidth_bytes_per_second(gpu)
    if bandwidth is None or not gpu.sm_count:
        return None
    return min(DEQUANTISED_PER_SECOND * gpu.sm_count / DEQUANTISED_BY, bandwidth / DEQUANTISE_BYTES)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
