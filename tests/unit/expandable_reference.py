"""torch's caching allocator with expandable segments once more, for tests: of each pool nothing is kept but
the pages that are mapped and the blocks in use; all else is found anew for each request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from planner.memory.allocators.native import MIB, SMALL_SIZE

SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB


@dataclass
class Pool:
    """Numbers of the pages that are mapped, and length by start of the blocks in use, in bytes."""

    page: int
    mapped: set[int] = field(default_factory=set)
    used: dict[int, int] = field(default_factory=dict)

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """Start, end and whether mapped of what is not in use, by address; the last has no end."""
        taken = sorted((start, start + length) for start, length in self.used.items())
        end = max([last for _, last in taken] + [(page + 1) * self.page for page in self.mapped], default=0)
        found: list[tuple[int, int, bool]] = []
        at = 0
        for start, stop in [*taken, (end, end)]:
            while at < start:
                is_mapped = at // self.page in self.mapped
                until = min(start, (at // self.page + 1) * self.page)
                if found and found[-1][1:] == (at, is_mapped):
                    found[-1] = (found[-1][0], until, is_mapped)
                else:
                    found.append((at, until, is_mapped))
                at = until
            at = max(at, stop)
        if found and found[-1][1:] == (end, False):
            end = found.pop()[0]
        yield from found
        yield end, 2**62, False

    def fits(self, size: int) -> bool:
        """Whether a free block is large enough as it is."""
        return any(mapped and end - start >= size for start, end, mapped in self.runs())

    def allocate(self, size: int) -> int:
        """Serve a request; returns its start."""
        if not self.fits(size):
            start = self._lowest(size)
            self.mapped |= set(range(start // self.page, -(-(start + size) // self.page)))
        else:
            start = self._best(size)
        self.used[start] = size
        return start

    def _best(self, size: int) -> int:
        """By size, and on as long as the next free block can grow less far (get_free_block)."""
        runs = list(self.runs())
        holes = {start: end - start for start, end, mapped in runs if not mapped}
        free = sorted((end - start, start) for start, end, mapped in runs if mapped and end - start >= size)
        grown = [(length + holes.get(start + length, 0), start) for length, start in free]
        best = 0
        while best + 1 < len(grown) and grown[best + 1][0] < grown[best][0]:
            best += 1
        return grown[best][1]

    def _lowest(self, size: int) -> int:
        """Where unmapped addresses, or the free block before them, begin a gap that is long enough
        (find_expandable_block).
        """
        runs = list(self.runs())
        for index, (_, _, mapped) in enumerate(runs):
            if mapped:
                continue
            first = index - (index > 0 and runs[index - 1][1] == runs[index][0])
            end = runs[first][0]
            for start, stop, _ in runs[first:]:
                if start != end:
                    break
                end = stop
            if end - runs[first][0] >= size:
                return runs[first][0]
        raise AssertionError("the last run has no end")

    def empty(self) -> None:
        """Unmap the pages that lie wholly in free blocks."""
        for start, end, mapped in list(self.runs()):
            if mapped:
                self.mapped -= set(range(-(-start // self.page), end // self.page))


class Reference:
    """Both pools: requests of up to 1 MiB, and larger ones."""

    def __init__(self) -> None:
        self.small, self.large = Pool(SMALL_PAGE), Pool(LARGE_PAGE)

    def pool(self, size: int) -> Pool:
        """The pool of a request."""
        return self.small if size <= SMALL_SIZE else self.large

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return sum(sum(pool.used.values()) for pool in (self.small, self.large))

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the mapped pages."""
        return sum(len(pool.mapped) * pool.page for pool in (self.small, self.large))
