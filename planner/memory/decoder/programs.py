"""The programs that a replay runs for each decoder layer: when its kernels are new, and from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.base.values import dataclass
from planner.memory.decoder.buffer_reuse import placed, tuned
from planner.memory.decoder.groups import LayerGroup
from planner.memory.decoder.program import Program, layer_program


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedProgram:
    """A layer's program with the sizes of its blocks in the allocator's units."""

    program: Program
    units: Sequence[int]


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
    groups: Sequence[LayerGroup], *, tokens: int, scores: int, accumulates: bool, tuning_bytes: int
) -> list[ReplayedLayer]:
    """Each layer's programs, in the model's order.

    `tuning_bytes` is what inductor takes to time a kernel that is new: those of a group's forward pass are
    new in its first layer, those of backward in its last.
    """

    def sized(program: Program) -> SizedProgram:
        return SizedProgram(program=program, units=program.units(tokens, scores))

    found: dict[int, ReplayedLayer] = {}
    for group in groups:
        programs = [group_program(group, accumulating=accumulating) for accumulating in (False, accumulates)]
        if group.knobs.compiled:
            programs = [placed(program, tokens, scores) for program in programs]
        first, later = map(sized, programs)
        layer = ReplayedLayer(new=first, first=first, later=later)
        found |= dict.fromkeys(group.indices, layer)
        if group.knobs.compiled:
            begins, ends = min(group.indices), max(group.indices)
            for index in {begins, ends}:
                program = tuned(first.program, tuning_bytes, forward=index == begins, backward=index == ends)
                found[index] = replace(layer, new=sized(program))
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
