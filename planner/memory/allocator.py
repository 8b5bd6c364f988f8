"""torch's native CUDA caching allocator, as far as it decides how many bytes count as allocated.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch 2.11 to 2.13): sizes round
to 512 bytes; up to 1 MiB come from 2 MiB segments, up to 10 MiB from 20 MiB segments, larger ones from
segments of their own rounded to 2 MiB; a block is split when more than 512 bytes (small pool) or more than
1 MiB (large pool) would be left, else its unsplit tail counts as allocated.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 2**20
MIN_BLOCK = 512
SMALL_SIZE = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE_ALLOCATION = 10 * MIB
LARGE_ROUNDING = 2 * MIB


def rounded(size_bytes: int) -> int:
    """Size of the smallest block that serves a request."""
    return max(MIN_BLOCK, -(-size_bytes // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size_bytes: int) -> int:
    """Size of the segment that the driver is asked for when no cached block serves a (rounded) request."""
    if size_bytes <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size_bytes < MIN_LARGE_ALLOCATION:
        return LARGE_SEGMENT
    return -(-size_bytes // LARGE_ROUNDING) * LARGE_ROUNDING


class CachingAllocator:
    """Replays requests; addresses are numbers, segments lie far apart so that blocks never merge across."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._starts: dict[int, tuple[int, bool]] = {}
        self._ends: dict[int, int] = {}
        self._used: dict[int, tuple[int, bool]] = {}
        self._next = 0

    def allocate(self, size_bytes: int) -> int:
        """Serve a request; returns its address."""
        size = rounded(size_bytes)
        small = size <= SMALL_SIZE
        pool = self._free[small]
        index = bisect_left(pool, (size, -1))
        if index < len(pool):
            block_size, address = pool.pop(index)
            self._forget(address, block_size)
        else:
            block_size, address = segment_size(size), self._next
            self.reserved_bytes += block_size
            self._next += block_size + LARGE_SEGMENT
        remaining = block_size - size
        if remaining >= MIN_BLOCK if small else remaining > SMALL_SIZE:
            self._remember(address + size, remaining, small)
            block_size = size
        self._used[address] = (block_size, small)
        self.allocated_bytes += block_size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return address

    def free(self, address: int) -> None:
        """Give a block back to the cache, merging it with free neighbours of its segment."""
        size, small = self._used.pop(address)
        self.allocated_bytes -= size
        after = self._starts.get(address + size)
        if after is not None:
            self._pop(address + size, after[0], small)
            size += after[0]
        before = self._ends.get(address)
        if before is not None:
            length = address - before
            self._pop(before, length, small)
            address, size = before, size + length
        self._remember(address, size, small)

    def empty_cache(self) -> None:
        """Forget free blocks that are whole segments; approximated as all free blocks between passes."""
        for small in (True, False):
            self._free[small].clear()
        self._starts.clear()
        self._ends.clear()

    def _remember(self, address: int, size: int, small: bool) -> None:
        insort(self._free[small], (size, address))
        self._starts[address] = (size, small)
        self._ends[address + size] = address

    def _forget(self, address: int, size: int) -> None:
        del self._starts[address]
        del self._ends[address + size]

    def _pop(self, address: int, size: int, small: bool) -> None:
        pool = self._free[small]
        del pool[bisect_left(pool, (size, address))]
        self._forget(address, size)
