"""Programs: what a layer allocates and frees, in order, as events that the allocator can replay.

The operations that give live bytes (planner/memory/decoder/layer.py, norms.py) are written down by a tape
that logs. A program has no sizes of its own: bytes are linear in tokens and attention scores, as on the tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from planner.base.values import dataclass
from planner.memory.allocators.native import block_units
from planner.memory.decoder.layer import run_final_norm, run_layer
from planner.memory.decoder.live_bytes import gradients_before
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.tape.events import block_of, free, frees
from planner.memory.tape.logging_tape import BlockBytes, LoggedBlock, LoggingTape, number
from planner.memory.tape.tape import GRADIENTS, Value
from planner.models.spec import LayerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Events of one layer's forward and backward pass: see planner/memory/tape/events.py.

    Blocks 0 (the input) and `incoming` (the output's gradient) are there when the pass that uses them starts.
    `output` is left by forward, `outgoing` (the input's gradient, null if nobody asks for it) and `gradients`
    (of trained weights) by backward. `casts` are left by forward until the whole forward pass ends. Whatever
    else forward leaves is `kept` for backward, which frees it (`kept_once`: saved by one node alone). With
    `checkpointed` backward recomputes, and frees nothing of block 0; else one of the passes frees block 0
    after its last use: `keeps_input` says that it is backward. After `recomputed` events of backward all that
    it recomputes is there (0: nothing is); after the one at `unpacked` the last of it is used, and the
    checkpoint lets go of the input. After `first_product` events
    of forward the layer's first matrix product runs, its output there. Of a compiled layer `foreign` blocks
    are outputs of operators that inductor does not generate, `inner` ones what those need in between, and
    `single` ones in fp32 rather than the compute dtype.
    """

    blocks: tuple[BlockBytes, ...]
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    checkpointed: bool
    keeps_input: bool
    recomputed: int
    unpacked: int
    first_product: int
    output: int
    incoming: int
    outgoing: int | None
    gradients: tuple[int, ...]
    casts: tuple[int, ...]
    kept: tuple[int, ...]
    kept_once: tuple[int, ...]
    foreign: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()
    single: frozenset[int] = frozenset()

    @property
    def keeps_input_alone(self) -> bool:
        """Whether forward leaves nothing but its input: by a checkpoint, or one inside a compiled layer."""
        return self.checkpointed or self.kept == (0,)

    def units(self, tokens: int, scores: int) -> list[int]:
        """Sizes of the blocks in the allocator's units."""
        return [block_units(int(a + b * tokens + c * scores)) for a, b, c in self.blocks]


@lru_cache(maxsize=1024)
def layer_program(
    layer: LayerSpec, knobs: LayerKnobs, *, checkpointed: bool, input_requires_grad: bool, accumulating: bool
) -> Program:
    """Program of one decoder layer; `accumulating` says that gradients of earlier micro-steps are there."""
    knobs = knobs.accumulating(accumulating)
    if checkpointed:
        return _checkpointed(layer, knobs)
    tape = LoggingTape(saves=True)
    hidden = Value(tape.given(), input_requires_grad)
    output = run_layer(tape, layer, knobs, hidden)
    return _both_passes(tape, hidden, output)


@lru_cache(maxsize=256)
def norm_program(layer: LayerSpec, knobs: LayerKnobs) -> Program:
    """Program of the norm after the last decoder layer."""
    tape = LoggingTape(saves=True)
    hidden = Value(tape.given(), True, knobs.stream_width)
    output = run_final_norm(tape, layer, knobs.accumulating(False), hidden)
    return _both_passes(tape, hidden, output)


def _both_passes(tape: LoggingTape, hidden: Value, output: Value) -> Program:
    """Forward that keeps what backward needs, and that backward; the caller lets go of input and output."""
    keeps_input = hidden.buffer.holders > 1
    tape.free(hidden.buffer)
    forward, product = tape.events, tape.first_product
    result = number(output.buffer)
    tape.events = []
    incoming = tape.given()
    output.grad = incoming
    tape.backward()
    return _program(
        tape,
        forward=forward,
        backward=tape.events,
        checkpointed=False,
        keeps_input=keeps_input,
        output=result,
        incoming=incoming.number,
        hidden=hidden,
        casts=(),
        first_product=product,
    )


def _checkpointed(layer: LayerSpec, knobs: LayerKnobs) -> Program:
    first = LoggingTape(saves=False)
    result = number(run_layer(first, layer, knobs, Value(first.given(), True)).buffer)
    tape = LoggingTape(saves=True, recomputes=True)
    tape.blocks, tape.slots = first.blocks.copy(), first.slots.copy()
    hidden = Value(LoggedBlock((0.0, 0.0, 0.0), 0, 0), True)
    output = run_layer(tape, layer, knobs, hidden)
    tape.free(output.buffer)
    recomputed = _stopped_early(tape.events, tape.last_save_event)
    known: dict[int, int] = {}
    if knobs.selective:
        # Forward keeps these; recomputation takes them as they are.
        known = dict(zip(tape.selected, first.selected, strict=True))
        first.events = [
            event for event in first.events if not (frees(event) and block_of(event) in first.selected)
        ]
        recomputed = renamed([event for event in recomputed if event not in known], known)
    tape.events = []
    incoming = tape.given()
    output.grad = incoming
    tape.backward()
    tape.events = renamed(tape.events, known)
    before, after = _split(tape.events, len(gradients_before(layer, knobs)) - 1, recomputed)
    return _program(
        tape,
        forward=first.events,
        backward=[*before, *recomputed, *after],
        checkpointed=True,
        keeps_input=True,
        output=result,
        incoming=incoming.number,
        hidden=hidden,
        casts=tuple(first.casts),
        first_product=first.first_product,
        recomputed=frozenset(event for event in recomputed if event >= 0),
    )


def renamed(events: Sequence[int], names: dict[int, int]) -> list[int]:
    """Events on blocks under other numbers."""
    blocks = ((event, names.get(block_of(event), block_of(event))) for event in events)
    return [free(block) if frees(event) else block for event, block in blocks]


def _stopped_early(events: Sequence[int], last_save: int) -> list[int]:
    """Recomputation up to its last saved tensor; what it has not saved is let go as the stop unwinds it.

    torch/utils/checkpoint.py, _StopRecomputationError.
    """
    rest = events[last_save:]
    never = {event for event in rest if event >= 0}
    return [*events[:last_save], *(event for event in rest if frees(event) and block_of(event) not in never)]


def _split(events: Sequence[int], allocations: int, recomputed: Sequence[int]) -> tuple[list[int], list[int]]:
    """Backward up to its so many first allocations, which asks for no saved tensor, and from there on."""
    index, left = 0, allocations
    while left:
        left -= events[index] >= 0
        index += 1
    saved = {event for event in recomputed if event >= 0}
    while allocations and frees(events[index]) and block_of(events[index]) not in saved:
        index += 1
    return list(events[:index]), list(events[index:])


def _program(
    tape: LoggingTape,
    *,
    forward: Sequence[int],
    backward: Sequence[int],
    checkpointed: bool,
    keeps_input: bool,
    output: int,
    incoming: int,
    hidden: Value,
    casts: tuple[int, ...],
    first_product: int | None,
    recomputed: frozenset[int] = frozenset(),
) -> Program:
    """A program without the blocks that have no bytes."""
    outgoing = None if hidden.grad is None else number(hidden.grad)
    empty = {n for n, size in enumerate(tape.blocks) if not any(size)} - {0, incoming}
    passes = [
        tuple(event for event in events if block_of(event) not in empty) for events in (forward, backward)
    ]
    before = (block_of(event) for event in forward[: first_product or 0])
    left = _left({0}, passes[0]) - {output, *casts}
    after = _left(left | {incoming} | ({0} if checkpointed else set()), passes[1])
    gradients = tuple(sorted(n for n in after if tape.slots[n] == 3 * GRADIENTS))
    if after - {*gradients, outgoing} - ({0} if checkpointed else set()):
        raise AssertionError("a layer's backward pass leaves blocks behind")
    made = [at for at, event in enumerate(passes[1]) if event in recomputed]
    used = [at for at, event in enumerate(passes[1]) if frees(event) and block_of(event) in recomputed]
    return Program(
        blocks=tuple(tape.blocks),
        forward=passes[0],
        backward=passes[1],
        checkpointed=checkpointed,
        keeps_input=keeps_input,
        recomputed=made[-1] + 1 if made else 0,
        unpacked=used[-1] if used else len(passes[1]) - 1,
        first_product=sum(block not in empty for block in before),
        output=output,
        incoming=incoming,
        outgoing=outgoing,
        gradients=gradients,
        casts=casts,
        kept=tuple(sorted(left)),
        kept_once=tuple(sorted(block for block in left if tape.save_counts[block] == 1)),
        foreign=frozenset(tape.foreign),
        inner=frozenset(tape.inner),
        single=frozenset(tape.single),
    )


def _left(held: set[int], events: Sequence[int]) -> set[int]:
    """What is held after events."""
    held = set(held)
    for event in events:
        if frees(event):
            held.remove(block_of(event))
        else:
            held.add(event)
    return held
