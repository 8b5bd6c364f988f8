"""One pool of an expandable allocator: a range of addresses, and what led on from each of its states.

Passes come back to states in which they have run: offloading leaves nothing of a layer, and micro-steps begin
as others did. From an equal state the same requests do the same, so that nothing has to be replayed then.
"""

from __future__ import annotations

from planner.memory.allocators.address_range import AddressRange
from planner.memory.allocators.gapped_range import GappedRange
from planner.memory.allocators.passes import Piece

Key = tuple[int | tuple[tuple[int, int], ...], tuple[int, ...]]
"""What decides where blocks of a range come to lie: its end or its gaps, and its free blocks."""
Step = tuple["State", tuple[int, ...], int, int]
"""Where requests led: the state, addresses of the blocks that they left, how many units from the range's
start have to be mapped for them, and how many they mapped beside what was (in a range with gaps)."""


class State:
    """A state of a range, by `key`, which says where blocks come to lie, and the steps that were taken from
    it: of a pass with the addresses that it was given, of a size that was asked for, of a freed block.
    """

    __slots__ = ("key", "steps")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.steps: dict[object, Step] = {}


class Pool:
    """Blocks of one range that begins at `start` and is mapped by pages; sizes and addresses in units."""

    def __init__(self, space: AddressRange | GappedRange) -> None:
        self.reserved = space.reserved
        self._start, self._page = space.start, space.page
        self._states: dict[Key, State] = {}
        # The space is in the state `_at`; following what is known leaves it behind.
        self._space = space
        self._state = self._at = self._known(space)

    def copy(self) -> Pool:
        """A pool in the same state, which remembers nothing."""
        return Pool(self._there().copy())

    @property
    def key(self) -> Key:
        """What decides where blocks come to lie."""
        return self._state.key

    def take(self, size: int) -> int:
        """Serve a request; returns its address."""
        step = self._state.steps.get(size)
        if step is None:
            step = self._stepped(size, (self.opened().take(size),))
        self._follow(step)
        return step[1][0]

    def give(self, address: int, size: int) -> None:
        """Free a block."""
        step = self._state.steps.get((address, size))
        if step is None:
            self.opened().give(address, size)
            step = self._stepped((address, size), ())
        self._follow(step)

    def play(self, piece: Piece, slots: list[int]) -> None:
        """Replay what a pass asks of this pool."""
        key = piece, tuple([slots[block] for block in piece.given])
        step = self._state.steps.get(key)
        if step is None:
            self.opened().play(piece, slots)
            step = self._stepped(key, tuple([slots[block] for block in piece.left]))
        else:
            for block, address in zip(piece.left, step[1], strict=True):
                slots[block] = address
        self._follow(step)

    def opened(self) -> AddressRange | GappedRange:
        """The range itself, for requests of which no step is made; `close` ends them."""
        space = self._there()
        # What is mapped is counted anew.
        if isinstance(space, AddressRange):
            space.mapped = space.start
        else:
            space.reserved = 0
        return space

    def close(self) -> None:
        """Take what was done to the open range."""
        self._follow(self._closed(()))

    def empty(self) -> None:
        """Unmap the pages that lie wholly in free blocks."""
        self._space = self._there().emptied()
        self.reserved = self._space.reserved
        self._state = self._at = self._known(self._space)

    def _there(self) -> AddressRange | GappedRange:
        """The range in the state that has been reached."""
        if self._at is not self._state:
            what, holes = self._state.key
            if isinstance(what, int):
                self._space = AddressRange.restored(self._start, self._page, what, holes)
            else:
                self._space = GappedRange.restored(self._start, self._page, what, holes)
            self._at = self._state
        if isinstance(self._space, AddressRange):
            self._space.mapped = self._start + self.reserved
        else:
            self._space.reserved = self.reserved
        return self._space

    def _stepped(self, key: object, left: tuple[int, ...]) -> Step:
        """Remember what requests on the open range came to."""
        step = self._state.steps[key] = self._closed(left)
        return step

    def _closed(self, left: tuple[int, ...]) -> Step:
        space = self._space
        reach, grown = (space.reserved, 0) if isinstance(space, AddressRange) else (0, space.reserved)
        if isinstance(space, GappedRange) and len(space.unmapped) == 1:
            # A range whose gaps have been filled is one without them again.
            self._space = AddressRange.of(space)
        self._at = self._known(self._space)
        return self._at, left, reach, grown

    def _follow(self, step: Step) -> None:
        self._state, _, reach, grown = step
        if reach > self.reserved:
            self.reserved = reach
        self.reserved += grown

    def _known(self, space: AddressRange | GappedRange) -> State:
        key = space.state()
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = State(key)
        return found
