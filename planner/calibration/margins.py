"""Intervals from held-out residuals: how wide one is, and how much wider where nothing like it was measured.

Every shortfall is that of a run whose model was left out of the fit. The ordinary margin covers the worst of
them. How much that says of a setup with something no run had is learned in the same way: all runs that have
one thing are held out together, and the factor is the worst of what they needed over what the others allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from planner.base.values import dataclass

SIZES = ("length", "tokens", "rank", "parameters")
MIN_RUNS = 3
"""Runs from which a margin of their own is learned."""
LEAST_OUTSIDE_FACTOR = 2.0
"""What nothing was measured of never has the ordinary interval, however well the held-out runs did: the model
was mended with them at hand.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortfall:
    """What a held-out run needed beyond its expected figure, in bytes (negative: less).

    `scale_bytes` is what the margin is a share of, `kind` the interval's (runtime.interval_kind), `things`
    the values of knobs and layouts that the run had, `sizes` what SIZES names.
    """

    beyond_bytes: int
    scale_bytes: int
    kind: str
    things: frozenset[tuple[str, str]]
    sizes: tuple[int, ...]


def margin_share(shortfalls: Sequence[Shortfall], *, kind: str, constant_bytes: int, slack: float) -> float:
    """The share of the scale that, with the constant part, covers every run of the kind, and some slack.

    Where fewer than MIN_RUNS runs are of the kind, all runs are taken.
    """
    own = [one for one in shortfalls if one.kind == kind]
    pool = own if len(own) >= MIN_RUNS else shortfalls
    worst = max(((one.beyond_bytes - constant_bytes) / one.scale_bytes for one in pool), default=0.0)
    return max(0.0, worst) + slack


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutThing:
    """What the runs with one thing needed of the interval learned without them: at most 1 is covered."""

    thing: str
    runs: int
    ratio: float


def held_out_things(
    shortfalls: Sequence[Shortfall], *, constant_bytes: int, slack: Mapping[str, float]
) -> tuple[HeldOutThing, ...]:
    """Every thing that at most half of the runs had, held out; the worst first.

    `slack` is that of each kind. Sizes are held out too: the runs above the median length, tokens, rank and
    parameter count.
    """
    found = []
    for name, has in _things(shortfalls):
        rest = [one for one in shortfalls if not has(one)]
        held = [one for one in shortfalls if has(one)]
        if not held or len(held) > len(rest):
            continue
        worst = 0.0
        for one in held:
            if sum(other.kind == one.kind for other in rest) < MIN_RUNS:
                # Nothing of the kind is left: any margin would be another kind's.
                continue
            share = margin_share(rest, kind=one.kind, constant_bytes=constant_bytes, slack=slack[one.kind])
            worst = max(worst, one.beyond_bytes / (share * one.scale_bytes + constant_bytes))
        found.append(HeldOutThing(thing=name, runs=len(held), ratio=worst))
    return tuple(sorted(found, key=lambda thing: -thing.ratio))


def outside_factor(things: Sequence[HeldOutThing]) -> float:
    """By how much the interval is wider for each thing that no run had."""
    return max([LEAST_OUTSIDE_FACTOR, *(thing.ratio for thing in things)])


def _things(shortfalls: Sequence[Shortfall]) -> Iterator[tuple[str, Callable[[Shortfall], bool]]]:
    for thing in sorted({thing for one in shortfalls for thing in one.things}):
        yield f"{thing[0]}={thing[1]}", partial(_has, thing)
    for index, name in enumerate(SIZES if shortfalls else ()):
        middle = sorted(one.sizes[index] for one in shortfalls)[len(shortfalls) // 2]
        yield f"{name} above {middle:,}", partial(_exceeds, index, middle)


def _has(thing: tuple[str, str], one: Shortfall) -> bool:
    return thing in one.things


def _exceeds(index: int, size: int, one: Shortfall) -> bool:
    return one.sizes[index] > size
