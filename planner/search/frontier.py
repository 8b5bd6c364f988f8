"""The frontier of a search: of all that was tried, what no other setup beats in both time and memory.

The plan's own setup is one of them, and all are replayed as it was. Beside it stand the smaller ones, which
are slower, and the faster ones, which do not fit. `runners_up` says in a few lines why the nearest of the
others lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.answers.plan import Alternative, FrontierPoint, RunnerUp
from planner.search import SPEED_TIE, Tried, finish_seconds
from planner.search.evaluator import Evaluator

SHOWN_BELOW, SHOWN_ABOVE = 4, 3
"""Points beside the chosen one that are worth a reader's time; all of them are in the plan's JSON."""
MAX_RUNNERS_UP = 4


def settled(tried: Iterable[Tried], evaluator: Evaluator) -> tuple[Tried, ...]:
    """The same with those replayed to the end of which the fitted estimate leaves open whether they fit."""
    return tuple(one if one.fits or _cannot_fit(one, evaluator) else _whole(one, evaluator) for one in tried)


def _cannot_fit(one: Tried, evaluator: Evaluator) -> bool:
    return evaluator.fitted(one.candidate.setup).peak_lower_bytes > evaluator.usable_bytes


def _whole(one: Tried, evaluator: Evaluator) -> Tried:
    candidate = evaluator.confirm(one.candidate.setup, whole=True)
    return Tried(strategy=one.strategy, candidate=candidate, fits=evaluator.fits(candidate))


def frontier(
    tried: Iterable[Tried], chosen: Tried, evaluator: Evaluator, *, tokens: int
) -> tuple[FrontierPoint, ...]:
    """Setups that no other one is both smaller and done with `tokens` as soon as, by rising memory.

    Times closer than a tie count as equal. All are replayed through the allocator, with every other one that
    the fitted estimate's lower end would have among them. Without a forecast of speed there is no frontier.
    """
    others = [one for one in tried if one.candidate.setup != chosen.candidate.setup]
    timed = [
        (seconds, one) for one in others if (seconds := finish_seconds(one.candidate, tokens)) is not None
    ]
    now = finish_seconds(chosen.candidate, tokens)
    if now is None or len(timed) < len(others):
        return ()
    # Smallest first, so that few are replayed before the rest is seen to be larger than what is as fast.
    timed.sort(key=lambda pair: (evaluator.fitted(pair[1].candidate.setup).peak_upper_bytes, pair[0]))
    points = [_point(_whole(chosen, evaluator), now, chosen=True)]
    for seconds, one in timed:
        least = evaluator.fitted(one.candidate.setup).peak_lower_bytes
        if not any(
            point.peak_upper_bytes <= least and point.hours * 3600 <= seconds * (1 + SPEED_TIE)
            for point in points
        ):
            points.append(_point(_whole(one, evaluator), seconds, chosen=False))
    return _unbeaten(points)


def _unbeaten(points: Iterable[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    found: list[FrontierPoint] = []
    least = float("inf")
    for point in sorted(points, key=lambda one: (one.peak_upper_bytes, one.hours)):
        if point.chosen or point.hours * (1 + SPEED_TIE) < least:
            found.append(point)
            least = min(least, point.hours)
    return tuple(found)


def _point(one: Tried, seconds: float, *, chosen: bool) -> FrontierPoint:
    candidate = one.candidate
    return FrontierPoint(
        strategy=one.strategy,
        setup=candidate.setup,
        peak_upper_bytes=candidate.peak_upper_bytes,
        tokens_per_second=candidate.tokens_per_second or 0.0,
        hours=seconds / 3600,
        fits=one.fits,
        chosen=chosen,
    )


def around_the_chosen(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """The chosen point with its neighbours, and the smallest one."""
    at = next((index for index, point in enumerate(points) if point.chosen), len(points) - 1)
    first = max(0, at - SHOWN_BELOW)
    shown = tuple(points[first : at + SHOWN_ABOVE + 1])
    return shown if first == 0 else (points[0], *shown[1:])


def runners_up(
    alternatives: Iterable[Alternative], points: Sequence[FrontierPoint], usable_bytes: int
) -> tuple[RunnerUp, ...]:
    """Why not another setup: the fastest of the others that fit, then the faster ones that are too large.

    Where nothing faster was tried, the one that lacks least stands for what is too large.
    """
    found = []
    fitting = [one for one in alternatives if one.fits]
    if fitting:
        best = min(fitting, key=lambda one: (_given_up(one), one.peak_upper_bytes))
        found.append(_lost(best, -_given_up(best), 0))
    now = next((point.hours for point in points if point.chosen), None)
    for point in points:
        if now is not None and not point.fits and point.hours < now:
            setup = point.setup
            found.append(
                RunnerUp(
                    strategy=point.strategy,
                    per_device_train_batch_size=setup.per_device_train_batch_size,
                    gradient_accumulation_steps=setup.gradient_accumulation_steps,
                    lost="too large",
                    faster=now / point.hours - 1,
                    lacking_bytes=point.peak_upper_bytes - usable_bytes,
                )
            )
    large = [one for one in alternatives if not one.fits]
    if large and not any(one.lacking_bytes for one in found):
        nearest = min(large, key=lambda one: one.peak_upper_bytes)
        found.append(_lost(nearest, 0.0, nearest.peak_upper_bytes - usable_bytes))
    return tuple(found[:MAX_RUNNERS_UP])


def _given_up(one: Alternative) -> float:
    return one.amount if one.lost in ("slower", "offloads") else 0.0


def _lost(one: Alternative, faster: float, lacking_bytes: int) -> RunnerUp:
    return RunnerUp(
        strategy=one.strategy,
        per_device_train_batch_size=one.per_device_train_batch_size,
        gradient_accumulation_steps=one.gradient_accumulation_steps,
        lost=one.lost,
        faster=faster,
        lacking_bytes=lacking_bytes,
    )
