"""The frontier of a search: of all that was tried, what no other setup beats in both speed and memory.

The plan's own setup is one of them. Beside it stand the smaller ones, which are slower, and the faster ones,
which do not fit. `runners_up` says in a few lines why the nearest of the others lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.candidate import Evaluator
from planner.memory.breakdown import REPLAYED
from planner.plan import Alternative, FrontierPoint
from planner.search import SPEED_TIE, Tried

SHOWN_BELOW, SHOWN_ABOVE = 4, 3
"""Points beside the chosen one that are worth a reader's time; all of them are in the plan's JSON."""
MAX_RUNNERS_UP = 4


def frontier(tried: Iterable[Tried], chosen: Tried, evaluator: Evaluator) -> tuple[FrontierPoint, ...]:
    """Setups that no other one is both smaller and at least as fast as, by rising memory.

    Speeds closer than a tie count as equal. Without a forecast of speed there is no frontier.
    """
    others = [one for one in tried if one.candidate.setup != chosen.candidate.setup]
    points = [_point(one, chosen, evaluator) for one in (*others, chosen)]
    points.sort(key=lambda one: (one.peak_upper_bytes, -(one.tokens_per_second or 0.0)))
    found: list[FrontierPoint] = []
    fastest = 0.0
    for point in points:
        rate = point.tokens_per_second
        if rate is None:
            return ()
        if point.chosen or rate > fastest * (1 + SPEED_TIE):
            found.append(point)
            fastest = max(fastest, rate)
    return tuple(found)


def _point(one: Tried, chosen: Tried, evaluator: Evaluator) -> FrontierPoint:
    candidate = one.candidate
    peak = candidate.peak_upper_bytes
    if not one.fits and candidate.memory.basis.reserve == REPLAYED:
        # A replay ends where it has shown that something is too large: the estimate tells by how much.
        peak = max(peak, evaluator.evaluate(candidate.setup).peak_upper_bytes)
    return FrontierPoint(
        strategy=one.strategy,
        setup=candidate.setup,
        peak_upper_bytes=peak,
        tokens_per_second=candidate.tokens_per_second,
        fits=one.fits,
        chosen=one is chosen,
    )


def around_the_chosen(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """The chosen point with its neighbours, and the smallest one."""
    at = next((index for index, point in enumerate(points) if point.chosen), len(points) - 1)
    first = max(0, at - SHOWN_BELOW)
    shown = tuple(points[first : at + SHOWN_ABOVE + 1])
    return shown if first == 0 else (points[0], *shown[1:])


def runners_up(alternatives: Sequence[Alternative], chosen_rate: float | None) -> tuple[Alternative, ...]:
    """Why not another setup: the fastest of the others that fit, then the faster ones that are too large.

    Of those, one that needs more than another and is no faster is left out. Where nothing faster was tried,
    the one that lacks least stands for what is too large.
    """
    fitting = [one for one in alternatives if one.fits]
    large = sorted((one for one in alternatives if not one.fits), key=lambda one: one.peak_upper_bytes)
    found = []
    if fitting:
        found.append(max(fitting, key=lambda one: (one.tokens_per_second or 0.0, -one.peak_upper_bytes)))
    fastest = chosen_rate or 0.0
    for one in large:
        if (one.tokens_per_second or 0.0) > fastest * (1 + SPEED_TIE):
            found.append(one)
            fastest = one.tokens_per_second or 0.0
    if large and not any(not one.fits for one in found):
        found.append(large[0])
    return tuple(found[:MAX_RUNNERS_UP])
