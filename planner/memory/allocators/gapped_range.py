"""One range of addresses with holes in what is mapped, as emptying the cache leaves them.

A free block before unmapped addresses counts as large as it could grow, so a request takes another that fits
if there is one; memory is mapped at the lowest address where the request fits with the free block before it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from planner.memory.allocators.native import ADDRESS, SHIFT, OutOfAddressesError
from planner.memory.allocators.passes import Piece

RANGE_UNITS = 2**34
"""Length of a range: larger than any GPU's memory."""


def ends_of(holes: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Of free blocks the sizes by their starts, and the starts by their ends."""
    size_at = {hole & ADDRESS: hole >> SHIFT for hole in holes}
    return size_at, {start + size: start for start, size in size_at.items()}


class GappedRange:
    """Blocks of a range; addresses, sizes and pages in units.

    All free blocks are in `holes` as size << 36 | address, sorted; `unmapped` are lengths by start.
    """

    def __init__(self, start: int, page: int, *, mapped: int) -> None:
        self.start, self.page = start, page
        self.reserved = mapped - start
        self.holes: list[int] = []
        self.size_at: dict[int, int] = {}
        self.start_of: dict[int, int] = {}
        self.unmapped = {mapped: start + RANGE_UNITS - mapped}

    def state(self) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """What decides where blocks come to lie."""
        return tuple(sorted(self.unmapped.items())), tuple(self.holes)

    @classmethod
    def restored(
        cls, start: int, page: int, unmapped: Iterable[tuple[int, int]], holes: Iterable[int]
    ) -> GappedRange:
        """A range in such a state; how much of it is mapped that does not say."""
        other = cls(start, page, mapped=start)
        other.unmapped, other.holes = dict(unmapped), list(holes)
        other.size_at, other.start_of = ends_of(other.holes)
        return other

    def copy(self) -> GappedRange:
        """A range in the same state."""
        other = GappedRange(self.start, self.page, mapped=self.start)
        other.reserved, other.unmapped = self.reserved, self.unmapped.copy()
        other.holes = self.holes.copy()
        other.size_at, other.start_of = self.size_at.copy(), self.start_of.copy()
        return other

    def play(self, piece: Piece, slots: list[int]) -> None:
        """Replay what a pass asks of this pool: `take` and `give` for each event, in one loop over local
        names unless memory has to be mapped.
        """
        holes, size_at, start_of, unmapped = self.holes, self.size_at, self.start_of, self.unmapped
        for event, size in piece.sized:
            if event >= 0:
                index = bisect_left(holes, size << SHIFT)
                entry = holes[index] if index < len(holes) else 0
                found, address = entry >> SHIFT, entry & ADDRESS
                if not entry:
                    slots[event] = self.take(size)
                    continue
                if address + found in unmapped:
                    index = self._best(index)
                    found, address = holes[index] >> SHIFT, holes[index] & ADDRESS
                slots[event] = address
                del holes[index], size_at[address]
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
            after_size = size_at.pop(end, 0)
            if after_size:
                del holes[bisect_left(holes, after_size << SHIFT | end)]
                end += after_size
            before = start_of.pop(address, None)
            if before is not None:
                del holes[bisect_left(holes, (address - before) << SHIFT | before)]
                address = before
            insort(holes, (end - address) << SHIFT | address)
            size_at[address] = end - address
            start_of[end] = address

    def take(self, size: int) -> int:
        """Serve a request; returns its address."""
        holes = self.holes
        index = bisect_left(holes, size << SHIFT)
        if index < len(holes):
            entry = holes[index]
            if (entry >> SHIFT) + (entry & ADDRESS) in self.unmapped:
                index = self._best(index)
            entry = holes[index]
            found, address = entry >> SHIFT, entry & ADDRESS
            self.take_out(found, address)
        else:
            found, address = self._grown_block(size)
        self.put_in(found - size, address + size)
        return address

    def give(self, address: int, size: int) -> None:
        """Free a block, merging it with its free neighbours."""
        after = self.size_at.get(address + size, 0)
        if after:
            self.take_out(after, address + size)
            size += after
        before = self.start_of.get(address)
        if before is not None:
            self.take_out(address - before, before)
            size += address - before
            address = before
        self.put_in(size, address)

    def emptied(self) -> GappedRange:
        """The range as emptying the cache leaves it: pages that lie wholly in free blocks are unmapped."""
        page = self.page
        for entry in self.holes.copy():
            size, address = entry >> SHIFT, entry & ADDRESS
            first, last = -(-address // page) * page, (address + size) // page * page
            if last <= first:
                continue
            self.take_out(size, address)
            self.put_in(first - address, address)
            self.put_in(address + size - last, last)
            self.reserved -= last - first
            self._unmap(first, last - first)
        return self

    def _unmap(self, start: int, length: int) -> None:
        """Mark addresses as unmapped, joined with those after and before."""
        length += self.unmapped.pop(start + length, 0)
        for before, units in self.unmapped.items():
            if before + units == start:
                self.unmapped[before] = units + length
                return
        self.unmapped[start] = length

    def _best(self, index: int) -> int:
        """Of the free blocks that are large enough the smallest, by the size that each can grow to."""
        best, size = index, self._grown(self.holes[index])
        for other in range(index + 1, len(self.holes)):
            grown = self._grown(self.holes[other])
            if grown >= size:
                break
            best, size = other, grown
        return best

    def _grown(self, entry: int) -> int:
        size, address = entry >> SHIFT, entry & ADDRESS
        return size + self.unmapped.get(address + size, 0)

    def _grown_block(self, size: int) -> tuple[int, int]:
        """Map pages until a request fits; size and address of one free block that is in no list."""
        start = self._lowest_fit(size)
        found = self.size_at.get(start, 0)
        if found:
            self.take_out(found, start)
        while found < size:
            end = start + found
            hole = self.unmapped.pop(end)
            mapped = min(hole, -(-(size - found) // self.page) * self.page)
            self.reserved += mapped
            found += mapped
            if mapped < hole:
                self.unmapped[end + mapped] = hole - mapped
                continue
            after = self.size_at.get(start + found, 0)
            if after:
                self.take_out(after, start + found)
                found += after
        return found, start

    def _lowest_fit(self, size: int) -> int:
        """The lowest address where free and unmapped blocks in a row, the second at latest unmapped, fit."""
        for hole in sorted(self.unmapped):
            start = self.start_of.get(hole, hole)
            end = start
            while end - start < size:
                following = self.size_at.get(end) or self.unmapped.get(end)
                if following is None:
                    break
                end += following
            else:
                return start
        raise OutOfAddressesError

    def take_out(self, size: int, address: int) -> None:
        """Remove a free block."""
        del self.holes[bisect_left(self.holes, size << SHIFT | address)]
        del self.size_at[address], self.start_of[address + size]

    def put_in(self, size: int, address: int) -> None:
        """Add a free block, unless it has no size."""
        if size:
            insort(self.holes, size << SHIFT | address)
            self.size_at[address] = size
            self.start_of[address + size] = address
