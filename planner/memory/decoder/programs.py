"""The programs that a replay runs for each decoder layer: when its kernels are new, and from then on."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import cached_property

from planner.base.values import dataclass
from planner.memory.allocators.passes import Pass
from planner.memory.decoder.buffer_reuse import placed, tuned
from planner.memory.decoder.groups import LayerGroup
from planner.memory.decoder.program import Program, layer_program
from planner.memory.tape.events import block_of, frees
from planner.memory.tape.logging_tape import BlockBytes


@dataclass(frozen=True, kw_only=True)
class SizedProgram:
    """A layer's program with the sizes of its blocks in the allocator's units, and its passes, each made when
    it is first asked for: an allocator remembers on them what they did.

    `passes` are those that programs with blocks of the same sizes have made, by their events: micro-steps
    that accumulate have the forward pass of others, and so have layers that differ in their window alone.
    """

    program: Program
    units: Sequence[int]
    passes: dict[tuple[int, ...], Pass]

    def _pass(self, events: tuple[int, ...]) -> Pass:
        found = self.passes.get(events)
        if found is None:
            found = self.passes[events] = Pass(events, self.units)
        return found

    @cached_property
    def forward(self) -> Pass:
        """The forward pass."""
        return self._pass(self.program.forward)

    @cached_property
    def first_forward(self) -> tuple[Pass, Pass]:
        """The first layer's, up to its first matrix product and from there on. The model's own forward pass
        holds the embeddings in a variable.
        """
        program = self.program
        held = (program.forward[: program.first_product], program.forward[program.first_product :])
        if not program.keeps_input:
            held = (_without(held[0], {0}), _without(held[1], {0}))
        return self._pass(held[0]), self._pass(held[1])

    @cached_property
    def backward(self) -> Pass:
        """The backward pass."""
        return self._pass(self.program.backward)

    @cached_property
    def checkpointed_backward(self) -> tuple[Pass, Pass]:
        """Backward up to where the checkpoint lets go of the layer's input, and from there on."""
        at, events = self.program.unpacked + 1, self.program.backward
        return self._pass(events[:at]), self._pass(events[at:])

    @cached_property
    def fetched_backward(self) -> tuple[Pass, Pass]:
        """Backward of what offloading brings back, which it lets go of itself: up to where all is recomputed,
        and from there on.
        """
        program = self.program
        fetched = {0} if program.keeps_input_alone else set(program.kept_once)
        events = _without(program.backward, fetched)
        return self._pass(events[: program.recomputed]), self._pass(events[program.recomputed :])

    @cached_property
    def kept_by_size(self) -> Sequence[int]:
        """What one node alone has saved, the largest last."""
        return sorted(self.program.kept_once, key=lambda block: self.units[block])


class ProgramSizes:
    """Programs with the sizes that a micro-step's tokens and attention scores give their blocks."""

    def __init__(self, tokens: int, scores: int) -> None:
        self.tokens, self.scores = tokens, scores
        self._known: dict[tuple[BlockBytes, ...], tuple[list[int], dict[tuple[int, ...], Pass]]] = {}

    def of(self, program: Program) -> SizedProgram:
        """One program with sizes."""
        found = self._known.get(program.blocks)
        if found is None:
            found = self._known[program.blocks] = program.units(self.tokens, self.scores), {}
        units, passes = found
        return SizedProgram(program=program, units=units, passes=passes)


def _without(events: Sequence[int], blocks: Set[int]) -> tuple[int, ...]:
    """Events but for frees of some blocks."""
    return tuple(event for event in events if not (frees(event) and block_of(event) in blocks))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedLayer:
    """A decoder layer in the very first micro-step, in the first of other steps, and in later ones."""

    new: SizedProgram
    first: SizedProgram
    later: SizedProgram

    def of(self, *, new: bool, later: bool) -> SizedProgram:
        """The program of one of those micro-steps."""
        return self.later if later else self.new if new else self.first


def replayed_layers(
    groups: Sequence[LayerGroup], sizes: ProgramSizes, *, accumulates: bool, tuning_bytes: int
) -> list[ReplayedLayer]:
    """Each layer's programs, in the model's order.

    `tuning_bytes` is what inductor takes to time a kernel that is new: those of a group's forward pass are
    new in its first layer, those of backward in its last.
    """
    found: dict[int, ReplayedLayer] = {}
    for group in groups:
        programs = [group_program(group, accumulating=accumulating) for accumulating in (False, accumulates)]
        if group.knobs.compiled:
            programs = [placed(program, sizes.tokens, sizes.scores) for program in programs]
        first, later = map(sizes.of, programs)
        layer = ReplayedLayer(new=first, first=first, later=later)
        found |= dict.fromkeys(group.indices, layer)
        if group.knobs.compiled:
            begins, ends = min(group.indices), max(group.indices)
            for index in {begins, ends}:
                program = tuned(first.program, tuning_bytes, forward=index == begins, backward=index == ends)
                found[index] = replace(layer, new=sizes.of(program))
    return [found[index] for index in sorted(found)]


def group_program(group: LayerGroup, *, accumulating: bool) -> Program:
    """The program of one of a group's layers."""
    return layer_program(
        group.layer,
        group.knobs,
        checkpointed=group.checkpointed,
        input_requires_grad=group.input_requires_grad,
        accumulating=accumulating,
    )
