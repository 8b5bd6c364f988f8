"""A tape that writes down what a layer allocates and frees (planner/memory/decoder/program.py reads it)."""

from __future__ import annotations

from collections import Counter

from planner.memory.tape.events import free
from planner.memory.tape.tape import Buffer, Tape

BlockBytes = tuple[float, float, float]
"""Bytes of a block: constant, per token, per score element."""


class LoggedBlock(Buffer):
    """A buffer that knows its number."""

    __slots__ = ("number",)

    def __init__(self, coefficients: BlockBytes, slot: int, number: int) -> None:
        super().__init__(*coefficients, slot)
        self.number = number


class LoggingTape(Tape):
    """A tape that writes down every allocation and free, in order; it counts no live bytes."""

    logs = True

    def __init__(self, *, saves: bool, recomputes: bool = False) -> None:
        super().__init__(saves=saves, recomputes=recomputes)
        self.blocks: list[BlockBytes] = []
        self.slots: list[int] = []
        self.events: list[int] = []
        self.casts: list[int] = []
        self.selected: list[int] = []
        self.foreign: set[int] = set()
        self.inner: set[int] = set()
        self.single: set[int] = set()
        self.save_counts: Counter[int] = Counter()
        self.last_save_event = 0
        self.first_product: int | None = None

    def given(self) -> LoggedBlock:
        """A block that is there already."""
        block = self._new(0.0, 0.0, 0.0, 0)
        self.events.pop()
        return block

    def _new(self, constant: float, per_token: float, per_score: float, slot: int) -> LoggedBlock:
        number = len(self.blocks)
        self.blocks.append((constant, per_token, per_score))
        self.slots.append(slot)
        self.events.append(number)
        return LoggedBlock((constant, per_token, per_score), slot, number)

    def _take(self, constant: float, per_token: float, per_score: float, slot: int) -> Buffer:
        return self._new(constant, per_token, per_score, slot)

    def tokens(self, per_token: float, category: int = 0) -> Buffer:
        """Allocate a buffer of so many bytes a token."""
        return self._new(0.0, per_token, 0.0, 3 * category)

    def free(self, *buffers: Buffer | None) -> None:
        """Let go of buffers; one is freed when its last holder does."""
        for buffer in buffers:
            if buffer is None:
                continue
            if buffer.holders > 1:
                buffer.holders -= 1
            else:
                self.events.append(free(number(buffer)))

    def save(self, buffer: Buffer) -> Buffer | None:
        """Hold a buffer for backward, when this tape saves at all."""
        if not self.saves:
            return None
        buffer.holders += 1
        self.last_save_event = len(self.events)
        self.save_counts[number(buffer)] += 1
        return buffer

    def product(self) -> None:
        """Note where the first matrix product runs."""
        if self.first_product is None:
            self.first_product = len(self.events)

    def by_operator(self, buffer: Buffer, *, inner: bool) -> None:
        """Note which blocks inductor does not allocate itself, and which it does not know."""
        (self.inner if inner else self.foreign).add(number(buffer))

    def in_single(self, buffer: Buffer) -> None:
        """Note which blocks are in fp32."""
        self.single.add(number(buffer))

    def select(self, *buffers: Buffer) -> None:
        """Name what selective checkpointing keeps."""
        self.selected += [number(buffer) for buffer in buffers]

    def cast_weights(self, *sizes_bytes: float) -> tuple[Buffer, ...]:
        """Copies that autocast holds until the forward pass ends, unless backward frees them."""
        copies = tuple(self.fixed(size) for size in sizes_bytes)
        if self.saves:
            return copies
        self.casts += [number(copy) for copy in copies]
        return ()


def number(buffer: Buffer) -> int:
    """Number of a buffer that a logging tape made."""
    if not isinstance(buffer, LoggedBlock):
        raise TypeError("the buffer is not of a logging tape")
    return buffer.number
