"""Cards by the memory they leave, smallest first, and the smallest that takes a setup or a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from planner.answers.plan import CardAdvice
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.search.evaluator import Evaluator
from planner.search.lean import leanest, smallest_that_fits
from planner.setup.run import Runs
from planner.setup.training_setup import TrainingSetup

# Cards differ in what the driver and cuBLAS take by far less than the rest; smaller cards are not tried.
CLEARLY_TOO_SMALL = 0.8


@functools.cache
def cards_by_memory() -> tuple[GpuSpec, ...]:
    """The catalog's cards, by rising usable memory; of equal ones the faster first."""
    return tuple(
        sorted(gpu_catalog(), key=lambda gpu: (gpu.usable_bytes, -(gpu.matrix_flops_per_second or 0.0)))
    )


def smallest_gpu(
    setup: TrainingSetup,
    runs: Runs,
    fixed: Mapping[str, Any],
    effective_batch_size: int,
    *,
    above_bytes: int = 0,
) -> tuple[GpuSpec | None, int]:
    """The card with least usable memory on which anything fits that a plan for such a setup tries, in the
    16-bit type that the card computes in, and the bytes it needs there; without a card those that it needs at
    least by the fitted estimate. Cards that leave no more than `above_bytes` are passed over.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
        InputError: the fixed knobs cannot give the effective batch.
    """
    largest = _evaluator(cards_by_memory()[-1], runs)
    about = min(
        (
            largest.fitted(one).peak_upper_bytes
            for one in leanest(setup, largest, effective_batch_size=effective_batch_size, fixed=fixed)
        ),
        default=largest.fitted(setup).peak_upper_bytes,
    )
    for gpu in cards_by_memory():
        if gpu.usable_bytes <= max(above_bytes, CLEARLY_TOO_SMALL * about):
            continue
        found = smallest_that_fits(
            native(setup, gpu),
            _evaluator(gpu, runs),
            effective_batch_size=effective_batch_size,
            fixed=fixed,
        )
        if found is not None:
            return gpu, found.peak_upper_bytes
    return None, about


def smallest_card(
    evaluator: Evaluator,
    setup: TrainingSetup,
    lengths: tuple[int, ...],
    fixed: Mapping[str, Any],
    effective_batch_size: int,
) -> CardAdvice | None:
    """The card with least memory, beyond the evaluator's, that takes the setup in some form at one of the
    lengths, and the longest of them that it takes.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    shortest = setup.replace(max_length=min(lengths))
    gpu, _ = smallest_gpu(
        shortest, evaluator.runs, fixed, effective_batch_size, above_bytes=evaluator.usable_bytes
    )
    if gpu is None:
        return None
    there, own = _evaluator(gpu, evaluator.runs), native(setup, gpu)
    longest = next(
        length
        for length in sorted(lengths, reverse=True)
        if smallest_that_fits(
            own.replace(max_length=length), there, effective_batch_size=effective_batch_size, fixed=fixed
        )
    )
    return CardAdvice(
        gpu=gpu.id,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=gpu.usable_bytes,
        max_length=longest,
    )


def _evaluator(gpu: GpuSpec, runs: Runs) -> Evaluator:
    """Of a card that holds nothing else, and full sequences."""
    return Evaluator(runs.model, gpu, gpu.usable_bytes, runs=runs)


def native(setup: TrainingSetup, gpu: GpuSpec) -> TrainingSetup:
    """The setup in the card's own 16-bit type; float32 stays."""
    return setup if setup.dtype in ("float32", gpu.dtype) else setup.replace(dtype=gpu.dtype)
