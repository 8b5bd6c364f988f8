"""Cards by the memory they leave, smallest first, and the smallest that takes a setup or a model."""

from __future__ import annotations

import functools

from planner.answers.plan import CardAdvice
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.memory import estimate_memory
from planner.search.evaluator import Evaluator
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


def smallest_gpu_for(
    setup: TrainingSetup,
    runs: Runs,
    about_bytes: int,
    *,
    above_bytes: int = 0,
    confirm: bool = True,
) -> GpuSpec | None:
    """The card with least usable memory that takes the setup; None when none of the catalog does.

    `about_bytes` is what the setup needs on some card; those far below it are passed over, and those that
    leave no more than `above_bytes`. With `confirm` the allocator's replay decides.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
    """
    for gpu in cards_by_memory():
        if gpu.usable_bytes <= max(above_bytes, CLEARLY_TOO_SMALL * about_bytes):
            continue
        if fits_on(gpu, setup, runs, confirm=confirm):
            return gpu
    return None


def smallest_card(evaluator: Evaluator, setup: TrainingSetup, lengths: tuple[int, ...]) -> CardAdvice | None:
    """The card with least memory that takes the smallest form of the setup at one of the lengths.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    shortest = setup.replace(max_length=min(lengths))
    about = evaluator.evaluate(shortest).peak_upper_bytes
    gpu = smallest_gpu_for(shortest, evaluator.runs, about, above_bytes=evaluator.usable_bytes)
    if gpu is None:
        return None
    longest = next(
        length
        for length in sorted(lengths, reverse=True)
        if fits_on(gpu, setup.replace(max_length=length), evaluator.runs)
    )
    return CardAdvice(
        gpu=gpu.id,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=gpu.usable_bytes,
        max_length=longest,
    )


def fits_on(gpu: GpuSpec, setup: TrainingSetup, runs: Runs, *, confirm: bool = True) -> bool:
    """Whether a setup fits on a card that holds nothing else, in the 16-bit type that the card computes in.

    With `confirm` the allocator's replay decides where the fitted estimate does not rule it out.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
    """
    run = runs.of(native(setup, gpu))
    fitted = estimate_memory(run, gpu=gpu)
    if not confirm:
        return fitted.fits(gpu.usable_bytes)
    if fitted.peak_lower_bytes > gpu.usable_bytes:
        return False
    return estimate_memory(run, gpu=gpu, replay=True).fits(gpu.usable_bytes)


def native(setup: TrainingSetup, gpu: GpuSpec) -> TrainingSetup:
    """The setup in the card's own 16-bit type; float32 stays."""
    return setup if setup.dtype in ("float32", gpu.dtype) else setup.replace(dtype=gpu.dtype)
