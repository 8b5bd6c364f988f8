"""The longest sequences that fit, in steps that matmuls like."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from planner.base.errors import NotModelledError
from planner.search.evaluator import Evaluator
from planner.setup.defaults import LENGTH_STEP
from planner.setup.training_setup import TrainingSetup


def longest_length(
    evaluator: Evaluator, base: TrainingSetup, *, start: int, limit: int, confirm: bool = False
) -> int | None:
    """The longest length from `start` to `limit` at which the base setup fits; None if `start` does not.

    Lengths are multiples of 64, and the limit itself. Memory rises with the length, so halving finds it. With
    `confirm` the allocator's replay decides; the fitted estimate tells where to look.
    """
    start = min(start, limit)
    low, high = start // LENGTH_STEP, -(-limit // LENGTH_STEP)

    def at(step: int) -> TrainingSetup:
        return base.replace(max_length=max(start, min(limit, step * LENGTH_STEP)))

    def fits(step: int) -> bool:
        try:
            return evaluator.setup_fits(at(step))
        except NotModelledError:
            return False

    if confirm:
        found = _confirmed(evaluator, at, low, high)
    elif fits(low):
        found = _halve(fits, low, high)
    else:
        found = None
    return None if found is None else at(found).max_length


def _halve(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The last step that fits, `low` being one that does and none beyond `high`."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _confirmed(evaluator: Evaluator, at: Callable[[int], TrainingSetup], low: int, high: int) -> int | None:
    """The same by replay: each one says how far off the fitted estimate is, and so where to look next."""
    if evaluator.try_evaluate(at(low)) is None:
        return None

    def within(step: int, room: int) -> bool:
        return evaluator.fitted(at(step)).peak_upper_bytes <= room

    room = evaluator.usable_bytes
    guess = _halve(lambda step: within(step, room), low, high)
    known, beyond = low - 1, high + 1
    while True:
        if evaluator.decide(at(guess)):
            known = guess
        else:
            beyond = guess
        if beyond - known <= 1:
            return None if known < low else known
        replayed = evaluator.confirm(at(guess), whole=True).peak_upper_bytes
        room = evaluator.usable_bytes - replayed + evaluator.fitted(at(guess)).peak_upper_bytes
        again = partial(within, room=room)
        guess = min(beyond - 1, max(known + 1, _halve(again, max(low, known), beyond - 1)))
