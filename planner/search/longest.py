"""The longest sequences that fit, in steps that matmuls like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """The same by replay. The first is made where the fitted estimate leads; that says how far off it is, and
    so where the second is made, and the two of them where the others are.
    """
    if evaluator.try_evaluate(at(low)) is None:
        return None

    def expected(step: int) -> int:
        return evaluator.expected(at(step)).peak_upper_bytes

    def where(room: int) -> int:
        return _halve(lambda step: expected(step) <= room, low, high)

    usable, guess = evaluator.usable_bytes, where(evaluator.usable_bytes)
    known, beyond = low - 1, high + 1
    seen: list[tuple[int, int]] = []
    while True:
        # Beside one that is known a replay need not go on beyond what does not fit.
        near = guess in (known + 1, beyond - 1)
        fits = evaluator.decide(at(guess)) if near else _fits_whole(evaluator, at(guess))
        known, beyond = (guess, beyond) if fits else (known, guess)
        if beyond - known <= 1:
            return None if known < low else known
        peak = evaluator.confirm(at(guess), whole=True).peak_upper_bytes
        seen.append((guess, peak))
        step = _on_a_line(seen, usable)
        if step is None:
            step = where(usable - peak + expected(guess))
        guess = min(beyond - 1, max(known + 1, step))


def _fits_whole(evaluator: Evaluator, setup: TrainingSetup) -> bool:
    return evaluator.fits(evaluator.confirm(setup, whole=True))


def _on_a_line(seen: Sequence[tuple[int, int]], usable_bytes: int) -> int | None:
    """The last step that fits if memory rises from the nearest as between the first two, which lie furthest
    apart; None where they do not tell.
    """
    if len(seen) < 2:
        return None
    (one, less), (other, more) = sorted(seen[:2])
    if more <= less:
        return None
    nearest, peak = min(seen, key=lambda pair: abs(pair[1] - usable_bytes))
    return nearest + (usable_bytes - peak) * (other - one) // (more - less)
