"""Which freed buffers of a compiled graph later ones take over, so that their memory stays where it is.

torch's inductor frees a buffer only if no later kernel of the graph writes one of its size and dtype: that
kernel takes the last one freed, where the buffer in between does not raise the graph's peak (torch/_inductor/
codegen/wrapper.py: AllocateLine.plan, should_reuse_buffer). Operators from outside (4-bit linear layers,
attention kernels) allocate their own outputs, which later kernels may take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from planner.memory.program import Program, renamed


@dataclass(frozen=True, kw_only=True, slots=True)
class Reused:
    """A pass's events without those that reuse makes unnecessary, how many of the first ones are left of each
    count, and the blocks that lie in another one's place: that block's number.
    """

    events: tuple[int, ...]
    left: tuple[int, ...]
    places: dict[int, int]


@lru_cache(maxsize=1024)
def placed(program: Program, tokens: int, scores: int) -> Program:
    """A compiled layer's program as its graphs reuse buffers, which depends on their sizes."""
    units = program.units(tokens, scores)
    forward = reuse(program.forward, units, program)
    backward = reuse(renamed(program.backward, forward.places), units, program)

    def after(numbers: Sequence[int], places: dict[int, int]) -> tuple[int, ...]:
        return tuple(sorted(places.get(number, number) for number in numbers))

    return replace(
        program,
        forward=forward.events,
        backward=backward.events,
        first_product=forward.left[program.first_product],
        unpacked=len(backward.events) - 1,
        output=forward.places.get(program.output, program.output),
        outgoing=backward.places.get(program.outgoing, program.outgoing)
        if program.outgoing is not None
        else None,
        gradients=after(program.gradients, backward.places),
        kept=after(program.kept, forward.places),
        kept_once=after(program.kept_once, forward.places),
    )


def reuse(events: Sequence[int], units: Sequence[int], program: Program) -> Reused:
    """One graph's reuse: its events, and the sizes of the program's blocks."""
    sizes = [0 if number in program.inner else size for number, size in enumerate(units)]
    live = _live(events, sizes)
    peak = max(live, default=0)
    freed: dict[tuple[int, bool], list[int]] = {}
    made: set[int] = set()
    places: dict[int, int] = {}
    gone: set[int] = set()
    for at, event in enumerate(events):
        number = event if event >= 0 else -1 - event
        size = sizes[number]
        kind = size, number in program.single
        if event < 0:
            if size and number in made:
                freed.setdefault(kind, []).append(at)
            continue
        made.add(number)
        if number in program.foreign or not freed.get(kind):
            continue
        since = freed[kind][-1]
        if size + max(live[since:at]) <= peak:
            freed[kind].pop()
            taken = -1 - events[since]
            places[number] = places.get(taken, taken)
            gone |= {since, at}
            for index in range(since, at):
                live[index] += size
    left = [0]
    for at in range(len(events)):
        left.append(left[-1] + (at not in gone))
    kept = [event for at, event in enumerate(events) if at not in gone]
    return Reused(events=tuple(renamed(kept, places)), left=tuple(left), places=places)


def _live(events: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """What is live after each event, beside what was there before."""
    found, now = [], 0
    for event in events:
        now += sizes[event] if event >= 0 else -sizes[-1 - event]
        found.append(now)
    return found
