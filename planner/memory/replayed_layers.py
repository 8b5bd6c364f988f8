"""The programs that a replay runs for each decoder layer: when its kernels are new, and from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from planner.memory.compiled_kept import order_is_known
from planner.memory.compiled_reuse import placed, tuned
from planner.memory.program import Program, layer_program
from planner.memory.segments import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedProgram:
    """A layer's program with the sizes of its blocks in the allocator's units."""

    program: Program
    tokens: int
    scores: int
    units: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", self.program.units(self.tokens, self.scores))


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
    parts: Sequence[Segment], *, tokens: int, scores: int, accumulates: bool, tuning_bytes: int
) -> list[ReplayedLayer]:
    """Each layer's programs, in the model's order.

    `tuning_bytes` is what inductor takes to time a kernel that is new: those of a part's forward pass are new
    in its first layer, those of backward in its last.
    """
    found: dict[int, ReplayedLayer] = {}
    for part in parts:
        first, later = (
            SizedProgram(program=program, tokens=tokens, scores=scores)
            for program in _programs(part, tokens, scores, accumulates=accumulates)
        )
        layer = ReplayedLayer(new=first, first=first, later=later)
        found |= dict.fromkeys(part.indices, layer)
        if part.knobs.compiled:
            begins, ends = min(part.indices), max(part.indices)
            for index in {begins, ends}:
                program = tuned(first.program, tuning_bytes, forward=index == begins, backward=index == ends)
                new = SizedProgram(program=program, tokens=tokens, scores=scores)
                found[index] = replace(layer, new=new)
    return [found[index] for index in sorted(found)]


def _programs(part: Segment, tokens: int, scores: int, *, accumulates: bool) -> Iterator[Program]:
    """The part's program without earlier gradients, and that of later micro-steps."""
    for accumulating in (False, accumulates):
        program = layer_program(
            part.layer,
            part.knobs,
            checkpointed=part.checkpointed,
            input_requires_grad=part.input_requires_grad,
            accumulating=accumulating,
        )
        known = part.knobs.compiled and order_is_known(part.layer)
        yield placed(program, tokens, scores) if known else program
