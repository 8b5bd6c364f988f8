"""The longest sequences that fit, in steps that matmuls like."""

from __future__ import annotations

from planner.candidate import Evaluator
from planner.policy import LENGTH_STEP
from planner.training_setup import TrainingSetup


def longest_length(evaluator: Evaluator, base: TrainingSetup, *, start: int, limit: int) -> int | None:
    """The longest length from `start` to `limit` at which the base setup fits; None if `start` does not.

    Lengths are multiples of 64, and the limit itself. Memory rises with the length, so halving finds it.
    """

    def fits(length: int) -> bool:
        candidate = evaluator.try_evaluate(base.replace(max_length=length))
        return candidate is not None and evaluator.fits(candidate)

    start = min(start, limit)
    if not fits(start):
        return None
    low, high = start // LENGTH_STEP, -(-limit // LENGTH_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(min(limit, middle * LENGTH_STEP)):
            low = middle
        else:
            high = middle - 1
    return max(start, min(limit, low * LENGTH_STEP))
