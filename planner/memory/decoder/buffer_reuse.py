"""What inductor's code allocates beyond its tensors' lifetimes: buffers taken over, and kernels being timed.

torch's inductor frees a buffer only if no later kernel of the graph writes one of its size and dtype: that
kernel takes the last one freed, where the buffer in between does not raise the graph's peak (torch/_inductor/
codegen/wrapper.py: AllocateLine.plan, should_reuse_buffer). Operators from outside (4-bit linear layers,
attention kernels) allocate their own outputs, which later kernels may take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from planner.base.values import dataclass
from planner.memory.decoder.program import Program, renamed
from planner.memory.tape.events import block_of, free, frees


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

    outgoing = program.outgoing
    if outgoing is not None:
        outgoing = backward.places.get(outgoing, outgoing)
    return replace(
        program,
        forward=forward.events,
        backward=backward.events,
        first_product=forward.left[program.first_product],
        unpacked=len(backward.events) - 1,
        output=forward.places.get(program.output, program.output),
        outgoing=outgoing,
        gradients=after(program.gradients, backward.places),
        kept=after(program.kept, forward.places),
        kept_once=after(program.kept_once, forward.places),
    )


def reuse(events: Sequence[int], units: Sequence[int], program: Program) -> Reused:
    """One graph's reuse: its events, and the sizes of the program's blocks."""
    sizes = [0 if number in program.inner else size for number, size in enumerate(units)]
    # After each event, beside what was there before.
    live = list(accumulate(-sizes[block_of(event)] if frees(event) else sizes[event] for event in events))
    peak = max(live, default=0)
    freed: dict[tuple[int, bool], list[int]] = {}
    made: set[int] = set()
    places: dict[int, int] = {}
    gone: set[int] = set()
    for at, event in enumerate(events):
        number = block_of(event)
        size = sizes[number]
        kind = size, number in program.single
        if frees(event):
            if size and number in made:
                freed.setdefault(kind, []).append(at)
            continue
        made.add(number)
        if number in program.foreign or not freed.get(kind):
            continue
        since = freed[kind][-1]
        if size + max(live[since:at]) <= peak:
            freed[kind].pop()
            taken = block_of(events[since])
            places[number] = places.get(taken, taken)
            gone |= {since, at}
            for index in range(since, at):
                live[index] += size
    kept = [event for at, event in enumerate(events) if at not in gone]
    left = accumulate((int(at not in gone) for at in range(len(events))), initial=0)
    return Reused(events=tuple(renamed(kept, places)), left=tuple(left), places=places)


def tuned(program: Program, buffer_bytes: int, *, forward: bool, backward: bool) -> Program:
    """A program whose kernels of a pass or both are timed as they first run: with its outputs there, a buffer
    as large as the GPU's level-2 cache is taken to flush it (torch/_inductor/runtime/benchmarking.py,
    benchmark_gpu; in the trace of a first step of Llama-3.1-8B with every fused kernel).
    """
    extra = len(program.blocks)
    before = _with_buffer(program.forward[: program.first_product], extra, program)
    after = _with_buffer(program.forward[program.first_product :], extra, program)
    last = _with_buffer(program.backward, extra, program)
    return replace(
        program,
        blocks=(*program.blocks, (float(buffer_bytes), 0.0, 0.0)),
        forward=(*before, *after) if forward else program.forward,
        first_product=len(before) if forward else program.first_product,
        backward=last if backward else program.backward,
        unpacked=len(last) - 1 if backward else program.unpacked,
    )


def _with_buffer(events: Sequence[int], extra: int, program: Program) -> tuple[int, ...]:
    """Events with the buffer taken and freed after the last output of each kernel that inductor generates."""
    found: list[int] = []
    for event, following in zip(events, (*events[1:], -1), strict=True):
        found.append(event)
        if event >= 0 > following and event not in program.foreign and event not in program.inner:
            found += [extra, free(extra)]
    return tuple(found)
