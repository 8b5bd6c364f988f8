"""What a pass did to a range of addresses, and whether it would do the same once more.

The layers of a model ask for the same blocks one after the other, of a range that differs by what the layer
before has left. A pass is served by few of the free blocks, its *regions*, together with the blocks that it
frees and the end of the range. It does the same in another state, moved by as much as each region is, if

- the regions are there, as large as before, in the same order of addresses, and touch the same of each other
  and no other free block: then they are split and joined in the same way, and ties go the same way;
- none of the other free blocks would serve a request better than the one that did: larger than the request
  and before it by size and address.

One free block, the largest when the pass starts, may be of another size, since a stack of layers eats it up
or gives it back: as long as what is left of it compares with each request, and with the block that serves
it, as it did.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Protocol

from planner.memory.allocators.native import ADDRESS, SHIFT
from planner.memory.allocators.passes import Piece

FEW = 12
"""Events below which recording a pass costs more than replaying it."""
_MORE = 2**40


class Space(Protocol):
    """A range of addresses as planner/memory/allocators/address_range.py has it."""

    top: int
    holes: list[int]
    size_at: dict[int, int]
    start_of: dict[int, int]

    def take(self, size: int) -> int:
        """Serve a request; returns its address."""

    def add(self, start: int, end: int) -> None:
        """Add a free block."""

    def remove(self, start: int, end: int) -> None:
        """Remove a free block."""

    def reach(self, end: int) -> None:
        """Map pages so far that `end` is within them."""


def worth_recording(piece: Piece) -> bool:
    """Whether a pass may come in the same way again: hardly as the first time, when no layer lies before it,
    and the more seldom it is recorded, the more often in a row it has come otherwise.
    """
    often = piece.missed
    return len(piece.events) >= FEW and often > 1 and often & (often - 1) == 0


class Repetition:
    """One run of a pass on a range."""

    def __init__(self, space: Space, piece: Piece, slots: list[int]) -> None:
        """Replay the pass, and write down what it rested on."""
        self._roots: dict[int, int] = {}
        self._top = self._highest = space.top
        self._at_end = False
        largest = space.holes[-1] if space.holes else 0
        self._largest = self._start_of_largest = largest & ADDRESS
        self._end_of_largest = self._largest + (largest >> SHIFT)
        self._rigid = not largest
        # The largest may grow by less than this, and shrink by less than that.
        self._room = self._slack = _MORE
        # For each size that was asked for the last free block that served it; 0 where only the largest or the
        # end did.
        self._served: dict[int, int] = {}
        # The state in which it came last, which says all, with where the regions then were.
        self._given = piece.given
        self._state: tuple[list[int], int, list[int]] | None = None
        self._found_at: list[int] = []
        self._grown = 0
        given = [(slots[block], piece.sizes[block], block) for block in piece.given]
        fresh = self._run(space, piece, slots)
        self._settle(given)
        self._settle_changes(space, fresh, [(block, slots[block]) for block in piece.left])

    def _run(self, space: Space, piece: Piece, slots: list[int]) -> set[int]:
        """Replay, and return the starts of the free blocks that are new or have changed."""
        holes, size_at, start_of, roots = space.holes, space.size_at, space.start_of, self._roots
        fresh: set[int] = set()
        for event in piece.events:
            if event >= 0:
                size = piece.sizes[event]
                index = bisect_left(holes, size << SHIFT)
                if index == len(holes):
                    self._serve_at_end(size)
                    slots[event] = space.take(size)
                    self._highest = max(self._highest, space.top)
                    continue
                entry = holes.pop(index)
                self._serve(size, entry, holes[index] if index < len(holes) else 0)
                slots[event] = address = entry & ADDRESS
                end = address + (entry >> SHIFT)
                del size_at[address]
                if address in fresh:
                    fresh.remove(address)
                else:
                    roots[address] = end - address
                address += size
                if address == end:
                    del start_of[end]
                    continue
            else:
                address, size = slots[-1 - event], piece.sizes[-1 - event]
                end = address + size
                self._rigid |= address == self._end_of_largest
                for start, stop in (
                    (end, end + size_at.get(end, 0)),
                    (start_of.get(address, address), address),
                ):
                    if start != stop:
                        space.remove(start, stop)
                        if start in fresh:
                            fresh.remove(start)
                        else:
                            roots[start] = stop - start
                        address, end = min(address, start), max(end, stop)
                if end == self._end_of_largest:
                    self._start_of_largest = address
                if end == space.top:
                    space.top, self._at_end = address, True
                    continue
            space.add(address, end)
            fresh.add(address)
        space.reach(self._highest)
        return fresh

    def _serve_at_end(self, size: int) -> None:
        """Nothing but the range's end is large enough for a request."""
        self._served[size], self._at_end = 0, True
        self._room = min(self._room, size - (self._end_of_largest - self._start_of_largest))

    def _serve(self, size: int, entry: int, following: int) -> None:
        """A free block is taken for a request, `following` being the next larger one (0: none)."""
        rest, found = self._end_of_largest - self._start_of_largest, entry >> SHIFT
        if (entry & ADDRESS) + found == self._end_of_largest:
            self._served[size] = 0
            self._rigid |= found == size
            self._slack = min(self._slack, found - size)
            if following:
                self._room = min(self._room, (following >> SHIFT) - found)
            self._start_of_largest += size
            return
        if self._served.setdefault(size, entry):
            self._served[size] = max(self._served[size], entry)
        if rest > found:
            self._slack = min(self._slack, rest - found)
        elif rest < size:
            self._room = min(self._room, size - rest)
        else:
            self._rigid = True

    def _settle(self, given: Sequence[tuple[int, int, int]]) -> None:
        """List the regions by address: size, the block that one of those given is (None: it was free),
        whether it touches the next one, and whether the one before and the one after touch it and were free.
        """
        found: list[tuple[int, int, int | None]] = [*given]
        found += [(address, size, None) for address, size in self._roots.items()]
        if self._at_end:
            found.append((self._top, _MORE, None))
        found.sort()
        self._starts = [address for address, _, _ in found]
        self._sizes = [size for _, size, _ in found]
        self._blocks = [block for _, _, block in found]
        ends = [address + size for address, size, _ in found]
        self._touches = [end == start for end, start in zip(ends, self._starts[1:], strict=False)] + [False]
        free = [block is None for block in self._blocks]
        after = [touch and one for touch, one in zip(self._touches, [*free[1:], False], strict=True)]
        before = [
            touch and one
            for touch, one in zip([False, *self._touches[:-1]], [False, *free[:-1]], strict=True)
        ]
        self._free_beside = list(zip(before, after, strict=True))
        self._flexible = -1
        if not self._rigid and self._largest in self._roots:
            self._flexible = self._starts.index(self._largest)

    def _place(self, address: int) -> tuple[int, int]:
        """An address as a region's number and how far into it."""
        region = bisect_right(self._starts, address) - 1
        return region, address - self._starts[region]

    def _settle_changes(self, space: Space, fresh: set[int], left: Sequence[tuple[int, int]]) -> None:
        """What the pass came to, by regions."""
        self._gone = [
            region
            for region, (address, size, block) in enumerate(
                zip(self._starts, self._sizes, self._blocks, strict=True)
            )
            if block is None and size != _MORE and not (address in fresh and space.size_at[address] == size)
        ]
        kept = {address for address in fresh if self._roots.get(address) == space.size_at[address]}
        self._new = [
            (*self._place(address), size, self._flexible >= 0 and address + size == self._end_of_largest)
            for address in fresh - kept
            for size in (space.size_at[address],)
        ]
        self._left = [(block, *self._place(address)) for block, address in left]
        self._end = self._place(space.top) if self._at_end else (-1, 0)
        self._wanted = [
            (size << SHIFT, (entry >> SHIFT) << SHIFT, *(self._place(entry & ADDRESS) if entry else (-1, 0)))
            for size, entry in self._served.items()
        ]

    def again(self, space: Space, slots: list[int]) -> bool:
        """Do the same once more; false, and nothing done, where something else would happen."""
        holes = space.holes
        state = [slots[block] for block in self._given], space.top, holes
        if state == self._state:
            self._apply(space, slots, self._found_at, self._grown)
            return True
        starts = self._found(space, slots)
        if starts is None or not self._touch_the_same(space, starts):
            return False
        grown = 0
        if self._flexible >= 0:
            grown = space.size_at[starts[self._flexible]] - self._sizes[self._flexible]
        own = set(starts)
        for asked, size, region, offset in self._wanted:
            index = bisect_left(holes, asked)
            while index < len(holes) and holes[index] & ADDRESS in own:
                index += 1
            if index < len(holes) and (region < 0 or holes[index] < size | starts[region] + offset):
                return False
        self._state = (*state[:2], holes.copy())
        self._found_at, self._grown = starts, grown
        self._apply(space, slots, starts, grown)
        return True

    def _found(self, space: Space, slots: Sequence[int]) -> list[int] | None:
        """Where the regions are; None if one is not there."""
        starts = [0] * len(self._starts)
        shifts: dict[int, None] = {0: None}
        open_regions = []
        for region, (old, size, block) in enumerate(
            zip(self._starts, self._sizes, self._blocks, strict=True)
        ):
            if block is not None:
                starts[region] = slots[block]
            elif size == _MORE:
                starts[region] = space.top
            elif region == self._flexible:
                entry = space.holes[-1] if space.holes else 0
                grown = (entry >> SHIFT) - size
                if grown and not -self._slack < grown < self._room:
                    return None
                starts[region] = entry & ADDRESS
            else:
                open_regions.append(region)
                continue
            shifts[starts[region] - old] = None
        for region in open_regions:
            old, size = self._starts[region], self._sizes[region]
            start = next((old + shift for shift in shifts if space.size_at.get(old + shift) == size), None)
            if start is None:
                return None
            starts[region] = start
        return starts

    def _touch_the_same(self, space: Space, starts: Sequence[int]) -> bool:
        """Whether regions lie in the same order, and touch the same of each other and nothing else that is
        free.
        """
        last, touched = -1, False
        for region, start in enumerate(starts):
            if start < last or (region and (start == last) != touched):
                return False
            size = self._sizes[region]
            if region == self._flexible:
                size = space.size_at[start]
            last, touched = start + size, self._touches[region]
            if self._blocks[region] is not None:
                beside = (start in space.start_of, last in space.size_at or last == space.top)
                if beside != self._free_beside[region]:
                    return False
        return True

    def _apply(self, space: Space, slots: list[int], starts: Sequence[int], grown: int) -> None:
        for region in self._gone:
            space.remove(starts[region], starts[region] + space.size_at[starts[region]])
        for region, offset, size, grows in self._new:
            start = starts[region] + offset
            space.add(start, start + size + (grown if grows else 0))
        for block, region, offset in self._left:
            slots[block] = starts[region] + offset
        if self._at_end:
            region, offset = self._end
            space.reach(starts[-1] + self._highest - self._top)
            space.top = starts[region] + offset
