"""Passes: events that an allocator replays again and again, prepared for that once."""

from __future__ import annotations

from collections.abc import Sequence


class Piece:
    """What a pass asks of one of the two pools: its events, each with the size of its block in units.

    The blocks `given` are there when it starts and freed by it, the blocks `left` are there when it ends.
    """

    __slots__ = ("given", "left", "sized")

    def __init__(self, sized: Sequence[tuple[int, int]], given: Sequence[int], left: Sequence[int]) -> None:
        self.sized, self.given, self.left = sized, given, left


class Pass:
    """Events of a program (planner/memory/tape/events.py) and the sizes of its blocks in units of 512 bytes.

    Where no block has an unsplit tail, what it allocates at most and leaves allocated follows from its sizes
    alone, and what it does to either pool from that pool alone.
    """

    def __init__(self, events: Sequence[int], units: Sequence[int]) -> None:
        self.events, self.units = events, units
        self.given = _given(events)
        self._prepared_for: list[int] | None = None
        self.small = self.large = Piece((), (), ())
        self.left: list[tuple[int, int]] = []
        self.most = self.change = 0

    def __len__(self) -> int:
        return len(self.events)

    def prepare(self, given: list[int], small_units: int) -> None:
        """Make what it asks of the `small` pool, whose blocks have up to `small_units`, and of the `large`
        one, and the blocks that it leaves, where those that it frees have the sizes `given`.
        """
        if given == self._prepared_for:
            return
        sizes = list(self.units)
        for block, size in zip(self.given, given, strict=True):
            sizes[block] = size
        now, self.most = 0, 0
        left: set[int] = set()
        for event in self.events:
            block = _block(event)
            now += sizes[block] if event >= 0 else -sizes[block]
            self.most = max(self.most, now)
            (left.add if event >= 0 else left.discard)(block)
        self.change = now
        self.left = [(block, sizes[block]) for block in sorted(left)]
        is_small = [size <= small_units for size in sizes]
        sized = [(event, sizes[_block(event)], is_small[_block(event)]) for event in self.events]
        self.small, self.large = (
            Piece(
                [(event, size) for event, size, small in sized if small is pool],
                [block for block in self.given if is_small[block] is pool],
                [block for block in sorted(left) if is_small[block] is pool],
            )
            for pool in (True, False)
        )
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
