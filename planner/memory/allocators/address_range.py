"""One range of addresses, mapped from its start as far as it was ever used: a pool of expandable segments.

What is mapped and free at its end is no free block like the others: it counts as large as it can grow, so a
request takes it where no other block is large enough. Where blocks come to lie does therefore not depend on
how much is mapped, which is the end of the highest block so far in whole pages.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from planner.memory.allocators.gapped_range import RANGE_UNITS, GappedRange, ends_of
from planner.memory.allocators.native import ADDRESS, SHIFT, OutOfAddressesError
from planner.memory.allocators.passes import Piece


class AddressRange:
    """Blocks of a range without holes in what is mapped; addresses, sizes and pages in units.

    Free blocks below `top`, where nothing is in use from, are in `holes` as size << 36 | address, sorted.
    """

    def __init__(self, start: int, page: int) -> None:
        self.start, self.page = start, page
        self.top = self.mapped = start
        self.holes: list[int] = []
        self.size_at: dict[int, int] = {}
        self.start_of: dict[int, int] = {}

    @property
    def reserved(self) -> int:
        """Units that are mapped."""
        return self.mapped - self.start

    def state(self) -> tuple[int, tuple[int, ...]]:
        """What decides where blocks come to lie."""
        return self.top, tuple(self.holes)

    @classmethod
    def restored(cls, start: int, page: int, top: int, holes: Iterable[int]) -> AddressRange:
        """A range in such a state; how much of it is mapped that does not say."""
        other = cls(start, page)
        other.top, other.holes = top, list(holes)
        other.size_at, other.start_of = ends_of(other.holes)
        return other

    def copy(self) -> AddressRange:
        """A range in the same state."""
        other = AddressRange(self.start, self.page)
        other.top, other.mapped = self.top, self.mapped
        other.holes = self.holes.copy()
        other.size_at, other.start_of = self.size_at.copy(), self.start_of.copy()
        return other

    def reach(self, end: int) -> None:
        """Map pages so far that `end` is within them."""
        if end > self.mapped:
            if end > self.start + RANGE_UNITS:
                raise OutOfAddressesError
            self.mapped = -(-end // self.page) * self.page

    def take(self, size: int) -> int:
        """Serve a request; returns its address."""
        holes = self.holes
        index = bisect_left(holes, size << SHIFT)
        if index == len(holes):
            address = self.top
            self.top += size
            self.reach(self.top)
            return address
        entry = holes.pop(index)
        address, found = entry & ADDRESS, entry >> SHIFT
        del self.size_at[address]
        if found > size:
            self.add(address + size, address + found)
        else:
            del self.start_of[address + found]
        return address

    def give(self, address: int, size: int) -> None:
        """Free a block, merging it with its free neighbours."""
        holes, size_at = self.holes, self.size_at
        end = address + size
        after = size_at.pop(end, 0)
        if after:
            del holes[bisect_left(holes, after << SHIFT | end)]
            end += after
        before = self.start_of.pop(address, None)
        if before is not None:
            del holes[bisect_left(holes, size_at.pop(before) << SHIFT | before)]
            address = before
        if end == self.top:
            self.top = address
        else:
            self.add(address, end)

    def add(self, start: int, end: int) -> None:
        """Add a free block."""
        insort(self.holes, (end - start) << SHIFT | start)
        self.size_at[start] = end - start
        self.start_of[end] = start

    def remove(self, start: int, end: int) -> None:
        """Remove a free block."""
        del self.holes[bisect_left(self.holes, (end - start) << SHIFT | start)]
        del self.size_at[start], self.start_of[end]

    def play(self, piece: Piece, slots: list[int]) -> None:
        """Replay what a pass asks of this pool: `take` and `give` for each event, in one loop over local
        names: a plan replays some 50,000.
        """
        holes, size_at, start_of = self.holes, self.size_at, self.start_of
        top = highest = self.top
        limit = self.start + RANGE_UNITS
        for event, size in piece.sized:
            if event >= 0:
                index = bisect_left(holes, size << SHIFT)
                if index == len(holes):
                    slots[event] = top
                    top += size
                    if top > highest:
                        highest = top
                        if top > limit:
                            raise OutOfAddressesError
                    continue
                entry = holes.pop(index)
                address, found = entry & ADDRESS, entry >> SHIFT
                slots[event] = address
                del size_at[address]
                if found > size:
                    after, rest = address + size, found - size
                    insort(holes, rest << SHIFT | after)
                    size_at[after] = rest
                    start_of[address + found] = after
                else:
                    del start_of[address + found]
                continue
            address = slots[-1 - event]
            end = address + size
            if end == top:
                top = start_of.pop(address, address)
                if top != address:
                    del holes[bisect_left(holes, size_at.pop(top) << SHIFT | top)]
                continue
            after_size = size_at.pop(end, 0)
            if after_size:
                del holes[bisect_left(holes, after_size << SHIFT | end)]
                end += after_size
            before = start_of.pop(address, None)
            if before is not None:
                del holes[bisect_left(holes, (address - before) << SHIFT | before)]
                address = before
            size = end - address
            insort(holes, size << SHIFT | address)
            size_at[address] = size
            start_of[end] = address
        self.top = top
        self.reach(highest)

    def emptied(self) -> AddressRange | GappedRange:
        """The range as emptying the cache leaves it: pages that lie wholly in free blocks are unmapped."""
        self.mapped = -(-self.top // self.page) * self.page
        if not any(self._whole_pages(entry) for entry in self.holes):
            return self
        return self._gapped().emptied()

    def _whole_pages(self, entry: int) -> bool:
        size, address = entry >> SHIFT, entry & ADDRESS
        return (address + size) // self.page > -(-address // self.page)

    def _gapped(self) -> GappedRange:
        other = GappedRange(self.start, self.page, mapped=self.mapped)
        other.holes, other.size_at, other.start_of = self.holes, self.size_at, self.start_of
        other.put_in(self.mapped - self.top, self.top)
        return other

    @classmethod
    def of(cls, gapped: GappedRange) -> AddressRange:
        """A range whose last gap has been filled."""
        other = cls(gapped.start, gapped.page)
        (other.mapped,) = gapped.unmapped
        other.top = gapped.start_of.get(other.mapped, other.mapped)
        if other.top != other.mapped:
            gapped.take_out(other.mapped - other.top, other.top)
        other.holes, other.size_at, other.start_of = gapped.holes, gapped.size_at, gapped.start_of
        return other
