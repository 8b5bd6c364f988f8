"""torch's CUDA caching allocator with expandable segments: one range of addresses for each pool, mapped as it
is needed.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.11: find_expandable_block, map_block, unmap_block): memory
is mapped in pages of 2 MiB for requests of up to 1 MiB and of 20 MiB for larger ones, at the lowest address
where the request fits with the free block before it; blocks are always split. A block before unmapped
addresses counts as large as it could grow, so a request takes another that fits if there is one. Emptying the
cache unmaps the pages that lie wholly in free blocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from planner.memory.allocators.native import (
    ADDRESS,
    LARGE_SEGMENT,
    MIN_BLOCK,
    SHIFT,
    SMALL_SEGMENT,
    SMALL_UNITS,
    CachingAllocator,
)
from planner.setup.cuda_allocator import EXPANDABLE

_SMALL_PAGE_UNITS = SMALL_SEGMENT // MIN_BLOCK
_LARGE_PAGE_UNITS = LARGE_SEGMENT // MIN_BLOCK
_SMALL_RANGE = 2**35
"""Where the small pool's addresses begin; the large pool's begin at 0."""
_RANGE_UNITS = 2**34
"""Length of a range: larger than any GPU's memory."""


def empty_allocator(allocator: str) -> CachingAllocator:
    """An allocator of the given name (planner/setup/cuda_allocator.py) that has nothing reserved."""
    return ExpandableAllocator() if allocator == EXPANDABLE else CachingAllocator()


class ExpandableAllocator(CachingAllocator):
    """Replays requests as CachingAllocator does, in two segments that grow."""

    always_splits = True

    def __init__(self) -> None:
        super().__init__()
        self._unmapped = {0: _RANGE_UNITS, _SMALL_RANGE: _RANGE_UNITS}

    def copy(self) -> ExpandableAllocator:
        """An allocator in the same state."""
        other = ExpandableAllocator()
        self._copy_into(other)
        other._unmapped = self._unmapped.copy()
        return other

    def empty_cache(self) -> None:
        """Unmap the pages that lie wholly in free blocks (torch.cuda.empty_cache)."""
        for pool, page in ((self._small, _SMALL_PAGE_UNITS), (self._large, _LARGE_PAGE_UNITS)):
            for entry in list(pool):
                size, address = entry >> SHIFT, entry & ADDRESS
                first, last = -(-address // page) * page, (address + size) // page * page
                if last <= first:
                    continue
                self._take_out(pool, size, address)
                self._put_in(pool, first - address, address)
                self._put_in(pool, address + size - last, last)
                self._reserved -= last - first
                self._unmap(first, last - first)

    def _unmap(self, start: int, length: int) -> None:
        """Mark addresses as unmapped, joined with those after and before."""
        length += self._unmapped.pop(start + length, 0)
        for before, units in self._unmapped.items():
            if before + units == start:
                self._unmapped[before] = units + length
                return
        self._unmapped[start] = length

    def _best(self, pool: list[int], index: int) -> int:
        """Of the free blocks that are large enough the smallest, by the size that each can grow to."""
        best, size = index, self._grown(pool[index])
        for other in range(index + 1, len(pool)):
            grown = self._grown(pool[other])
            if grown >= size:
                break
            best, size = other, grown
        return best

    def _grown(self, entry: int) -> int:
        size, address = entry >> SHIFT, entry & ADDRESS
        return size + self._unmapped.get(address + size, 0)

    def _new_segment(self, size: int) -> tuple[int, int]:
        """Map pages until a request fits; one free block that is in no list: its size and address."""
        small = size <= SMALL_UNITS
        pool, page = (self._small, _SMALL_PAGE_UNITS) if small else (self._large, _LARGE_PAGE_UNITS)
        start = self._lowest_fit(size, small=small)
        found = self._size_at.get(start, 0)
        if found:
            self._take_out(pool, found, start)
        while found < size:
            end = start + found
            hole = self._unmapped.pop(end)
            mapped = min(hole, -(-(size - found) // page) * page)
            self._reserved += mapped
            found += mapped
            if mapped < hole:
                self._unmapped[end + mapped] = hole - mapped
                continue
            after = self._size_at.get(start + found, 0)
            if after:
                self._take_out(pool, after, start + found)
                found += after
        self._start_of[start + found] = start
        return found, start

    def _lowest_fit(self, size: int, *, small: bool) -> int:
        """The lowest address where free and unmapped blocks in a row, the second at latest unmapped, fit."""
        size_at, unmapped = self._size_at, self._unmapped
        for hole in sorted(unmapped):
            if (hole >= _SMALL_RANGE) != small:
                continue
            start = self._start_of.get(hole, hole)
            end = start
            while end - start < size:
                following = size_at.get(end) or unmapped.get(end)
                if following is None:
                    break
                end += following
            else:
                return start
        raise MemoryError("a request larger than the range of addresses")

    def _take_out(self, pool: list[int], size: int, address: int) -> None:
        del pool[bisect_left(pool, size << SHIFT | address)]
        del self._size_at[address], self._start_of[address + size]

    def _put_in(self, pool: list[int], size: int, address: int) -> None:
        if size:
            insort(pool, size << SHIFT | address)
            self._size_at[address] = size
            self._start_of[address + size] = address
