"""Passes: events that an allocator replays again and again, prepared for that once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Piece:
    """What a pass asks of one of the two pools: its events with the sizes of all blocks, in units.

    The blocks `given` are there when it starts and freed by it, the blocks `left` are there when it ends.
    `known` is what a range of addresses remembers of the last time that it ran.
    """

    __slots__ = ("events", "given", "known", "left", "missed", "sizes")

    def __init__(
        self, events: Sequence[int], sizes: Sequence[int], given: Sequence[int], left: Sequence[int]
    ) -> None:
        self.events, self.sizes, self.given, self.left = events, sizes, given, left
        self.known: Any = None
        self.missed = 0


class Pass:
    """Events of a program (planner/memory/tape/events.py) and the sizes of its blocks in units of 512 bytes.

    Where no block has an unsplit tail, what it allocates at most and leaves allocated follows from its sizes
    alone, and what it does to either pool from that pool alone.
    """

    def __init__(self, events: Sequence[int], units: Sequence[int]) -> None:
        self.events, self.units = events, units
        self._given = _given(events)
        self._prepared_for: list[tuple[bool, int]] | None = None
        self._pieces = (Piece((), (), (), ()), Piece((), (), (), ()))
        self.most = self.change = 0

    def __len__(self) -> int:
        return len(self.events)

    def pieces(
        self, slots: Sequence[int], used: Mapping[int, int], *, small_from: int, small_units: int
    ) -> tuple[Piece, Piece]:
        """What it asks of the small pool, whose addresses begin at `small_from` and whose blocks have up to
        `small_units`, and of the large one.
        """
        given = [(slots[block] >= small_from, used[slots[block]]) for block in self._given]
        if given != self._prepared_for:
            self._prepare(given, small_units)
        return self._pieces

    def _prepare(self, given: list[tuple[bool, int]], small_units: int) -> None:
        sizes = list(self.units)
        in_small = {block: size <= small_units for block, size in enumerate(sizes)}
        for block, (is_small, size) in zip(self._given, given, strict=True):
            sizes[block], in_small[block] = size, is_small
        now, self.most = 0, 0
        left: set[int] = set()
        for event in self.events:
            block = _block(event)
            now += sizes[block] if event >= 0 else -sizes[block]
            self.most = max(self.most, now)
            (left.add if event >= 0 else left.discard)(block)
        self.change = now
        small, large = (
            Piece(
                tuple(event for event in self.events if in_small[_block(event)] is pool),
                sizes,
                tuple(block for block in self._given if in_small[block] is pool),
                tuple(block for block in sorted(left) if in_small[block] is pool),
            )
            for pool in (True, False)
        )
        self._pieces = small, large
        self._prepared_for = given


def _given(events: Sequence[int]) -> tuple[int, ...]:
    """Blocks that events free and did not allocate."""
    made: set[int] = set()
    found = []
    for event in events:
        if event >= 0:
            made.add(event)
        elif _block(event) not in made:
            found.append(_block(event))
    return tuple(found)


def _block(event: int) -> int:
    """The block that an event allocates or frees: see planner/memory/tape/events.py."""
    return event if event >= 0 else -1 - event
