"""Memory of the CUDA context on a card where none was measured, from one where it was.

Most of it is what a card keeps for its threads: for every thread that its processors can hold at once. So it
goes with their number, and what is left is alike everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.base.units import MIB
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec

ALIKE_BYTES = 28 * MIB
"""What a context has whatever the card: a line from the H100's 771 MiB to a T4's 141 leaves it for no thread.
MiB outside torch's allocator, of processes alone on a card: T4 128 (facebookresearch/tribev2#28), 135
(Zheng-Chong/CatVTON#133) and 141 (fitcheck-llm 0.3.1), this line 141; RTX 3090 256 (invoke-ai/InvokeAI#9413),
374; RTX 4090 416 (eosphoros-ai/DB-GPT-Hub#248, a LoRA run), 504 (3DTopia/Phidias-Diffusion#8) and 520
(huggingface/lora-fast#1), 568; RTX 6000 Ada 426 and 429 (unslothai/unsloth-zoo#1053, DINGYANB/MTVCrafter#21)
and L40S 522 (bmaltais/kohya_ss#2724, a LoRA run), 628; RTX 5090 595 (Wan-Video/Wan2.1#465) and 619
(TrajectoryCrafter/TrajectoryCrafter#20), 746. None lies above. Torch says them where it runs out of memory:
the process's less what it has allocated and reserved."""
CODE_BYTES = 148 * MIB
"""What an H200's context grows by from loading to the first step (619 to 767 MiB, 34 runs of profiles/runs),
kernels above all: how much of it goes with processors is not known, so the interval has all that does not
shrink."""
_THREADS = {(6, 0): 2048, (6, 1): 2048, (7, 0): 2048, (7, 5): 1024, (8, 0): 2048, (8, 6): 1536, (8, 9): 1536}
_THREADS |= {(9, 0): 2048, (10, 0): 2048, (12, 0): 1536}
"""Threads that a processor holds at once, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability")."""


class ContextMemory(NamedTuple):
    """A context's expected bytes once a step has run, and how many more there may be."""

    expected_bytes: int
    spread_bytes: int


@lru_cache(maxsize=1024)
def context_on(
    gpu: GpuSpec, measured_gpu: str, measured_bytes: int, spread_bytes: int
) -> ContextMemory | None:
    """The context on a card where `measured_bytes` were seen on another (its catalog id), `spread_bytes` more
    in some runs. None where a card's threads are not known.
    """
    there = next(iter(gpu_catalog().named(measured_gpu)), None)
    mine, theirs = _threads(gpu), None if there is None else _threads(there)
    if mine is None or theirs is None:
        return None
    share = mine / theirs
    alike = min(ALIKE_BYTES, measured_bytes)
    expected = alike + int((measured_bytes - alike) * share)
    return ContextMemory(expected, spread_bytes + int(CODE_BYTES * max(0.0, 1.0 - share)))


def _threads(gpu: GpuSpec) -> int | None:
    """Threads that all of a card's processors hold at once."""
    each = _THREADS.get(gpu.compute_capability)
    return None if each is None or gpu.sm_count is None else each * gpu.sm_count
