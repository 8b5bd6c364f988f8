"""torch's CUDA caching allocator with expandable segments: one range of addresses for each pool, mapped as it
is needed.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.11: find_expandable_block, map_block, unmap_block): memory
is mapped in pages of 2 MiB for requests of up to 1 MiB and of 20 MiB for larger ones, at the lowest address
where the request fits with the free block before it; blocks are always split. A block before unmapped
addresses counts as large as it could grow, so a request takes another that fits if there is one. Emptying the
cache unmaps the pages that lie wholly in free blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.memory.allocators.address_range import AddressRange
from planner.memory.allocators.native import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_SEGMENT,
    SMALL_UNITS,
    CachingAllocator,
    block_units,
)
from planner.memory.allocators.passes import Pass
from planner.memory.allocators.pool import Pool
from planner.setup.cuda_allocator import EXPANDABLE

_SMALL_PAGE_UNITS = SMALL_SEGMENT // MIN_BLOCK
_LARGE_PAGE_UNITS = LARGE_SEGMENT // MIN_BLOCK
_SMALL_RANGE = 2**35
"""Where the small pool's addresses begin; the large pool's begin at 0."""


def empty_allocator(allocator: str) -> CachingAllocator:
    """An allocator of the given name (planner/setup/cuda_allocator.py) that has nothing reserved."""
    return ExpandableAllocator() if allocator == EXPANDABLE else CachingAllocator()


class ExpandableAllocator(CachingAllocator):
    """Replays requests as CachingAllocator does, in two segments that grow."""

    def __init__(self) -> None:
        super().__init__()
        self._small_pool = Pool(AddressRange(_SMALL_RANGE, _SMALL_PAGE_UNITS))
        self._large_pool = Pool(AddressRange(0, _LARGE_PAGE_UNITS))

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all pages that are mapped."""
        return (self._small_pool.reserved + self._large_pool.reserved) * MIN_BLOCK

    def state(self) -> object:
        """What decides where blocks come to lie: from equal states the same events do the same."""
        return self._small_pool.key, self._large_pool.key, self._used.copy()

    def copy(self) -> ExpandableAllocator:
        """An allocator in the same state."""
        other = ExpandableAllocator()
        other._allocated, other._peak, other._used = self._allocated, self._peak, self._used.copy()
        other._small_pool, other._large_pool = self._small_pool.copy(), self._large_pool.copy()
        return other

    def allocate(self, size_bytes: int) -> int:
        """Serve a request; returns its address."""
        size = block_units(size_bytes)
        address = (self._small_pool if size <= SMALL_UNITS else self._large_pool).take(size)
        self._used[address] = size
        self._allocated += size
        if self._allocated > self._peak:
            self._peak = self._allocated
        return address

    def free(self, address: int) -> None:
        """Give a block back to the cache, merging it with free neighbours."""
        size = self._used.pop(address)
        self._allocated -= size
        (self._small_pool if size <= SMALL_UNITS else self._large_pool).give(address, size)

    def run(self, events: Sequence[int], units: Sequence[int], slots: list[int]) -> None:
        """Replay events once, of which nothing is remembered: see `play`."""
        small, large, used = self._small_pool.opened(), self._large_pool.opened(), self._used
        allocated, peak = self._allocated, self._peak
        for event in events:
            if event >= 0:
                size = units[event]
                slots[event] = address = (small if size <= SMALL_UNITS else large).take(size)
                used[address] = size
                allocated += size
                if allocated > peak:
                    peak = allocated
            else:
                address = slots[-1 - event]
                size = used.pop(address)
                allocated -= size
                (small if size <= SMALL_UNITS else large).give(address, size)
        self._allocated, self._peak = allocated, peak
        self._small_pool.close()
        self._large_pool.close()

    def play(self, one: Pass, slots: list[int]) -> None:
        """Replay a pass: its block n has the address `slots[n]`, where it is there before or after it."""
        used = self._used
        one.prepare([used.pop(slots[block]) for block in one.given], SMALL_UNITS)
        if one.small.sized:
            self._small_pool.play(one.small, slots)
        if one.large.sized:
            self._large_pool.play(one.large, slots)
        for block, size in one.left:
            used[slots[block]] = size
        if self._allocated + one.most > self._peak:
            self._peak = self._allocated + one.most
        self._allocated += one.change

    def empty_cache(self) -> None:
        """Unmap the pages that lie wholly in free blocks (torch.cuda.empty_cache)."""
        self._small_pool.empty()
        self._large_pool.empty()
