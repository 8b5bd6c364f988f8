"""The longest sequences that fit, in steps that matmuls like."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from planner.memory import MemoryBreakdown
from planner.search.evaluator import Evaluator
from planner.setup.defaults import LENGTH_STEP
from planner.setup.training_setup import TrainingSetup

REPLAYED_BELOW = 0.5
"""Where a replay's upper end is looked for first, in the fitted estimate's interval from its upper end down:
the middle of 36 longest lengths on 12 and 80 GB, of which nine in ten lay between 0 and 0.8."""

STRAIGHT_TRIES = 4
"""Replays within which the longest length is found but where reserved memory jumps."""


def longest_length(
    evaluator: Evaluator, base: TrainingSetup, *, start: int, limit: int, confirm: bool = False
) -> int | None:
    """The longest length from `start` to `limit` at which the base setup fits; None if `start` does not.

    Lengths are multiples of 64, and the limit itself. Memory rises with the length. With
    `confirm` the allocator's replay decides; the fitted estimate tells where to look.
    """
    start = min(start, limit)
    low, high = start // LENGTH_STEP, -(-limit // LENGTH_STEP)

    def at(step: int) -> TrainingSetup:
        return base.replace(max_length=max(start, min(limit, step * LENGTH_STEP)))

    if evaluator.try_fitted(at(low)) is None:
        return None
    search = _confirmed if confirm else _by_fit
    found = search(evaluator, at, low, high)
    return None if found is None else at(found).max_length


def _by_fit(evaluator: Evaluator, at: Callable[[int], TrainingSetup], low: int, high: int) -> int | None:
    over = partial(_over, evaluator, at, evaluator.usable_bytes)
    return None if over(low) > 0 else last_within(over, low, high)


def _over(evaluator: Evaluator, at: Callable[[int], TrainingSetup], room: int, step: int) -> float:
    """By how many bytes the fitted estimate is above the room at a step; what is not modelled has none."""
    fitted = evaluator.try_fitted(at(step))
    return math.inf if fitted is None else fitted.peak_upper_bytes - room


def last_within(over: Callable[[int], float], low: int, high: int) -> int:
    """The last step up to `high` at which nothing is `over`, which rises; `low` where there is none.

    Where it rises in a straight line three tries find it; every third one halves what is left.
    """
    last = over(high)
    if last <= 0 or low == high:
        return high
    first, tries, amount = over(low), 0, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        if tries % 3 == 0 and first < last < math.inf:
            middle = low + int((high - low) * -first / (last - first))
        elif tries % 3 == 1:
            middle = low + 1 if amount <= 0 else high - 1
        middle = min(high - 1, max(low + 1, middle))
        amount = over(middle)
        if amount <= 0:
            low, first = middle, amount
        else:
            high, last = middle, amount
        tries += 1
    return low


def _confirmed(evaluator: Evaluator, at: Callable[[int], TrainingSetup], low: int, high: int) -> int | None:
    """The same by replay: each one says where in the fitted estimate's interval it comes to lie, and so where
    to look next.
    """
    share, room = REPLAYED_BELOW, float(evaluator.usable_bytes)

    def over(step: int) -> float:
        fitted = evaluator.try_fitted(at(step))
        return math.inf if fitted is None else _below(fitted, share) - room

    known, beyond, tries = low - 1, high + 1, 0
    while beyond - known > 1:
        last = last_within(over, max(low, known), beyond - 1)
        if tries >= STRAIGHT_TRIES and tries % 2 == 0 and beyond <= high:
            # What is reserved jumps here: what was seen on one side does not tell where.
            last = (known + beyond) // 2
        guess = min(beyond - 1, max(known + 1, last))
        tries += 1
        # Of the next step's nothing but whether it fits is asked: it is the end if it does not.
        if evaluator.decide(at(guess), whole=guess > known + 1):
            known = guess
        else:
            beyond = guess
        if beyond - known > 1:
            replayed = evaluator.replayed(at(guess), whole=True).peak_upper_bytes
            fitted = evaluator.fitted(at(guess))
            width = fitted.peak_upper_bytes - fitted.peak_bytes
            share = min(1.0, max(0.0, (fitted.peak_upper_bytes - replayed) / max(1, width)))
            room = evaluator.usable_bytes + _below(fitted, share) - replayed
    return None if known < low else known


def _below(fitted: MemoryBreakdown, share: float) -> float:
    """The fitted estimate's upper end less so much of what lies between that and what is expected."""
    return fitted.peak_upper_bytes - share * (fitted.peak_upper_bytes - fitted.peak_bytes)
