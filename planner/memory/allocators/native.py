"""torch's native CUDA caching allocator: what a history of requests leaves allocated and reserved.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch 2.11 to 2.13): sizes round
to 512 bytes; up to 1 MiB come from 2 MiB segments, up to 10 MiB from 20 MiB segments, larger ones from
segments of their own rounded to 2 MiB; the smallest free block that is large enough serves a request, and is
split when more than 512 bytes (small pool) or more than 1 MiB (large pool) would be left, else its unsplit
tail counts as allocated; a freed block merges with its free neighbours.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from planner.base.units import MIB
from planner.memory.allocators.passes import Pass

MIN_BLOCK = 512
SMALL_SIZE = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE_ALLOCATION = 10 * MIB
LARGE_ROUNDING = 2 * MIB

SMALL_UNITS = SMALL_SIZE // MIN_BLOCK
_SMALL_SEGMENT_UNITS = SMALL_SEGMENT // MIN_BLOCK
_LARGE_SEGMENT_UNITS = LARGE_SEGMENT // MIN_BLOCK
_MIN_LARGE_UNITS = MIN_LARGE_ALLOCATION // MIN_BLOCK
_LARGE_ROUNDING_UNITS = LARGE_ROUNDING // MIN_BLOCK
SHIFT = 36
ADDRESS = (1 << SHIFT) - 1


class OutOfAddressesError(Exception):
    """A replay needs more addresses than it counts: terabytes, more than any GPU has."""


def rounded(size_bytes: int) -> int:
    """Size of the smallest block that serves a request."""
    return max(MIN_BLOCK, -(-size_bytes // MIN_BLOCK) * MIN_BLOCK)


def block_units(size_bytes: int) -> int:
    """The same in units of 512 bytes, as `CachingAllocator.run` takes sizes."""
    return -(-size_bytes // MIN_BLOCK) or 1


class CachingAllocator:
    """Replays requests. Addresses and sizes are counted in units of 512 bytes; segments lie a unit apart, so
    that blocks never merge across.
    """

    def __init__(self) -> None:
        self._allocated = 0
        self._reserved = 0
        self._peak = 0
        # Free blocks of both pools as size << 36 | address, sorted: best fit is the first large enough.
        self._small: list[int] = []
        self._large: list[int] = []
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._used: dict[int, int] = {}
        self._segments: dict[int, int] = {}
        self._next = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of blocks handed out, unsplit tails included."""
        return self._allocated * MIN_BLOCK

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments."""
        return self._reserved * MIN_BLOCK

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that was allocated since the start or `reset_peak`."""
        return self._peak * MIN_BLOCK

    def reset_peak(self) -> None:
        """Count the peak anew from what is allocated now."""
        self._peak = self._allocated

    def state(self) -> object:
        """What decides where blocks come to lie: from equal states the same events do the same."""
        return self._small.copy(), self._large.copy(), self._used.copy()

    def copy(self) -> CachingAllocator:
        """An allocator in the same state."""
        other = CachingAllocator()
        other._allocated, other._reserved, other._peak = self._allocated, self._reserved, self._peak
        other._small, other._large = self._small.copy(), self._large.copy()
        other._size_at, other._start_of = self._size_at.copy(), self._start_of.copy()
        other._used, other._segments, other._next = self._used.copy(), self._segments.copy(), self._next
        return other

    def allocate(self, size_bytes: int) -> int:
        """Serve a request; returns its address."""
        slots = [0]
        self.run((0,), (block_units(size_bytes),), slots)
        return slots[0]

    def free(self, address: int) -> None:
        """Give a block back to the cache, merging it with free neighbours of its segment."""
        self.run((-1,), (0,), [address])

    def allocate_all(self, sizes_bytes: Iterable[int]) -> list[int]:
        """Serve requests one after the other; returns their addresses."""
        units = [block_units(size) for size in sizes_bytes]
        slots = [0] * len(units)
        self.run(range(len(units)), units, slots)
        return slots

    def replace_all(self, addresses: list[int], sizes_bytes: Sequence[int]) -> list[int]:
        """Serve requests one after the other, after each of them giving one block back; returns the addresses
        of what was asked for.
        """
        count = len(addresses)
        slots = addresses + [0] * count
        events = [event for block in range(count) for event in (count + block, -1 - block)]
        self.run(events, [0] * count + [block_units(size) for size in sizes_bytes], slots)
        return slots[count:]

    def free_all(self, addresses: list[int]) -> None:
        """Give blocks back one after the other."""
        self.run(range(-1, -1 - len(addresses), -1), (), addresses)

    def play(self, one: Pass, slots: list[int]) -> None:
        """Replay a pass (planner/memory/allocators/passes.py)."""
        self.run(one.events, one.units, slots)

    def run(self, events: Sequence[int], units: Sequence[int], slots: list[int]) -> None:
        """Replay events (planner/memory/tape/events.py): block n has `units[n]`, and its address `slots[n]`.
        One loop over local names: a plan replays some 100,000 events.
        """
        small, large = self._small, self._large
        size_at, start_of, used = self._size_at, self._start_of, self._used
        allocated, peak = self._allocated, self._peak
        for event in events:
            if event >= 0:
                size = units[event]
                pool = small if size <= SMALL_UNITS else large
                index = bisect_left(pool, size << SHIFT)
                if index < len(pool):
                    entry = pool.pop(index)
                    found, address = entry >> SHIFT, entry & ADDRESS
                    del size_at[address]
                else:
                    found, address = self._new_segment(size)
                rest = found - size
                if rest > SMALL_UNITS or (rest and pool is small):
                    after = address + size
                    insort(pool, rest << SHIFT | after)
                    size_at[after] = rest
                    start_of[after + rest] = after
                    found = size
                else:
                    del start_of[address + found]
                used[address] = found
                slots[event] = address
                allocated += found
                if allocated > peak:
                    peak = allocated
            else:
                address = slots[-1 - event]
                size = used.pop(address)
                allocated -= size
                # A block's pool is its segment's, which its size tells: small segments hold no large blocks,
                # and a block of a large segment is larger than what the small pool serves.
                pool = small if size <= SMALL_UNITS else large
                end = address + size
                after_size = size_at.pop(end, 0)
                if after_size:
                    del pool[bisect_left(pool, after_size << SHIFT | end)]
                    size += after_size
                    end += after_size
                before = start_of.get(address)
                if before is not None:
                    del start_of[address]
                    before_size = address - before
                    del pool[bisect_left(pool, before_size << SHIFT | before)]
                    size += before_size
                    address = before
                insort(pool, size << SHIFT | address)
                size_at[address] = size
                start_of[end] = address
        self._allocated, self._peak = allocated, peak

    def empty_cache(self) -> None:
        """Give segments that are wholly free back to the driver (torch.cuda.empty_cache)."""
        for pool in (self._small, self._large):
            kept = []
            for entry in pool:
                size, address = entry >> SHIFT, entry & ADDRESS
                if self._segments.get(address) == size:
                    del self._segments[address], self._size_at[address], self._start_of[address + size]
                    self._reserved -= size
                else:
                    kept.append(entry)
            pool[:] = kept

    def _new_segment(self, size: int) -> tuple[int, int]:
        """A segment from the driver, as one free block that is in no list: its size and address."""
        if size <= SMALL_UNITS:
            segment = _SMALL_SEGMENT_UNITS
        elif size < _MIN_LARGE_UNITS:
            segment = _LARGE_SEGMENT_UNITS
        else:
            segment = -(-size // _LARGE_ROUNDING_UNITS) * _LARGE_ROUNDING_UNITS
        address = self._next
        if address + segment > ADDRESS:
            raise OutOfAddressesError
        self._next = address + segment + 1
        self._reserved += segment
        self._segments[address] = segment
        self._start_of[address + segment] = address
        return segment, address
