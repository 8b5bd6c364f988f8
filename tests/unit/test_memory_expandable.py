"""torch's caching allocator with expandable segments, as replayed: by example and against a reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.allocators.address_range import AddressRange
from planner.memory.allocators.expandable import ExpandableAllocator, empty_allocator
from planner.memory.allocators.native import (
    MIB,
    MIN_BLOCK,
    SMALL_SIZE,
    CachingAllocator,
    OutOfAddressesError,
    rounded,
)
from planner.memory.allocators.passes import Pass
from planner.memory.step.offload import OffloadReplay
from planner.memory.tape.events import free
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE
from tests.unit.expandable_reference import Reference

SMALL_BASE, LARGE_BASE = (ExpandableAllocator().allocate(size) for size in (1, SMALL_SIZE + 1))


def mib(allocator: CachingAllocator) -> tuple[float, float]:
    """Allocated and reserved."""
    return allocator.allocated_bytes / MIB, allocator.reserved_bytes / MIB


def place(address: int) -> float:
    """MiB from the start of the large pool's addresses."""
    return (address - LARGE_BASE) * MIN_BLOCK / MIB


def allocator_with(*sizes_mib: float) -> tuple[ExpandableAllocator, list[int]]:
    """Large blocks one after the other, and their addresses."""
    allocator = ExpandableAllocator()
    return allocator, [allocator.allocate(int(size * MIB)) for size in sizes_mib]


@pytest.mark.parametrize(
    ("asked", "mapped"),
    [
        (0, 2 * MIB),
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB, 20 * MIB),
        (20 * MIB, 20 * MIB),
        (20 * MIB + 1, 40 * MIB),
        (70 * MIB, 80 * MIB),
    ],
)
def test_memory_is_mapped_in_pages_of_2_and_20_mib(asked: int, mapped: int) -> None:
    allocator = ExpandableAllocator()
    allocator.allocate(asked)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (rounded(asked), mapped)


def test_every_rest_is_split_off() -> None:
    """The default allocator hands out a rest of up to 1 MiB with the block."""
    native, expandable = empty_allocator(NATIVE), empty_allocator(EXPANDABLE)
    for allocator in (native, expandable):
        allocator.allocate(11 * MIB)
    assert mib(native) == (12, 12)
    assert mib(expandable) == (11, 20)
    expandable.allocate(9 * MIB - 512)
    assert mib(expandable) == (20 - 1 / 2048, 20)
    # 512 bytes are left, which serve no request of the large pool.
    expandable.allocate(512)
    assert mib(expandable) == (20, 22)


def test_a_segment_grows_from_its_free_end() -> None:
    allocator, (first, second) = allocator_with(12, 12)
    assert (place(first), place(second)) == (0, 12)
    assert mib(allocator) == (24, 40)
    assert place(allocator.allocate(16 * MIB)) == 24
    assert mib(allocator) == (40, 40)


def test_blocks_of_one_segment_are_one_once_free() -> None:
    """In the default allocator each of these is a segment of its own, and none serves 40 MiB."""
    sizes = (20 * MIB, 10 * MIB, 10 * MIB)
    for name, reserved in ((EXPANDABLE, 40), (NATIVE, 80)):
        allocator = empty_allocator(name)
        for address in [allocator.allocate(size) for size in sizes]:
            allocator.free(address)
        assert mib(allocator) == (0, 40)
        allocator.allocate(40 * MIB)
        assert mib(allocator) == (40, reserved)


def test_a_free_end_counts_as_large_as_it_can_grow() -> None:
    allocator, (first, _) = allocator_with(16, 2)
    allocator.free(first)
    # The free end of 2 MiB would fit more tightly.
    assert place(allocator.allocate(2 * MIB)) == 0
    assert place(allocator.allocate(14 * MIB)) == 2
    assert place(allocator.allocate(2 * MIB)) == 18
    assert mib(allocator) == (20, 20) == (2 + 14 + 2 + 2, 20)


def test_the_search_for_a_better_block_ends_at_the_first_that_is_none() -> None:
    """As in get_free_block: free blocks by size, and on as long as the next cannot grow as far."""
    # 2 MiB at 18 can grow by a page to 22, what is free at 59 not at all; what is free at the end by all that
    # is left. Last is how long the last block is, so that 2 MiB or nothing is free at the end.
    for between, last, found in ((21, 20, 59), (22, 19, 18), (21, 18, 18)):
        allocator, (_, second, _, fourth, _) = allocator_with(18, 22, 19, between, last)
        allocator.free(second)
        allocator.empty_cache()
        allocator.free(fourth)
        assert place(allocator.allocate(3 * MIB // 2)) == found, (between, last)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_addresses_unmapped_one_after_the_other_are_one_hole(order: tuple[int, int]) -> None:
    allocator, blocks = allocator_with(18, 22, 20, 10, 30, 20)
    for index in order:
        allocator.free(blocks[index])
        allocator.empty_cache()
    allocator.free(blocks[4])
    assert mib(allocator) == (48, 80)
    # 2 MiB at 18 can grow by both pages to 42, more than the 30 that are free at 70.
    assert place(allocator.allocate(3 * MIB // 2)) == 70


def test_an_emptied_cache_gives_back_whole_pages() -> None:
    allocator, (first, second, third) = allocator_with(15, 50, 15)
    small = allocator.allocate(MIB)
    allocator.free(second)
    allocator.free(small)
    assert mib(allocator) == (30, 82)
    allocator.empty_cache()
    # Of 15 to 65 MiB the pages of 20 to 60, and the small one.
    assert mib(allocator) == (30, 40)
    allocator.free(first)
    allocator.free(third)
    allocator.empty_cache()
    assert mib(allocator) == (0, 0)
    assert place(allocator.allocate(15 * MIB)) == 0


def test_the_lowest_hole_that_fits_is_mapped_first() -> None:
    allocator, (first, _, third) = allocator_with(20, 20, 20)
    allocator.free(first)
    allocator.free(third)
    allocator.empty_cache()
    assert mib(allocator) == (20, 20)
    assert place(allocator.allocate(30 * MIB)) == 40
    assert mib(allocator) == (50, 60)
    assert place(allocator.allocate(12 * MIB)) == 0
    assert mib(allocator) == (62, 80)


def test_a_hole_is_joined_with_the_free_blocks_beside_it() -> None:
    allocator, (_, second, third, _) = allocator_with(10, 10, 30, 10)
    allocator.free(second)
    allocator.free(third)
    allocator.empty_cache()
    assert mib(allocator) == (20, 40)
    # Free from 10 to 20, unmapped to 40, free to 50: one more page makes a block of it.
    assert place(allocator.allocate(40 * MIB)) == 10
    assert mib(allocator) == (60, 60)


def test_a_hole_is_mapped_as_far_as_is_asked_for() -> None:
    allocator, (first, _) = allocator_with(60, 20)
    allocator.free(first)
    allocator.empty_cache()
    assert place(allocator.allocate(21 * MIB)) == 0
    assert mib(allocator) == (41, 60)
    assert place(allocator.allocate(19 * MIB)) == 21
    assert mib(allocator) == (60, 60)


def test_a_copy_goes_its_own_way() -> None:
    allocator, (first, _) = allocator_with(20, 20)
    allocator.allocate(1)
    other = allocator.copy()
    assert mib(other) == mib(allocator)
    other.free(first)
    other.empty_cache()
    other.allocate(70 * MIB)
    other.allocate(MIB)
    assert mib(allocator) == (40 + 1 / 2048, 42)
    # Had the hole become the first one's too, or its end been mapped, this would lie elsewhere.
    assert place(allocator.allocate(20 * MIB)) == 40
    assert mib(allocator) == (60 + 1 / 2048, 62)
    assert place(other.allocate(20 * MIB)) == 0


def test_a_request_beyond_all_addresses_is_refused() -> None:
    with pytest.raises(OutOfAddressesError):
        ExpandableAllocator().allocate(2**44)


def test_a_pass_is_refused_before_it_frees_what_lies_beyond_all_addresses() -> None:
    units = [2**36, 5000, 5000, 4000]
    with pytest.raises(OutOfAddressesError):
        ExpandableAllocator().run((0, 1, 2, free(1), 3), units, [0] * len(units))


def test_an_allocator_is_made_by_its_name_and_streams_have_the_same_kind() -> None:
    for name, kind in ((NATIVE, CachingAllocator), (EXPANDABLE, ExpandableAllocator)):
        allocator = empty_allocator(name)
        assert type(allocator) is type(allocator.copy()) is kind
        offload = OffloadReplay(allocator, input_bytes=MIB, norm_bytes=MIB, waits=False, stash=5)
        assert type(offload.stream) is kind
        assert offload.stream is not allocator


@dataclass(frozen=True)
class Free:
    """Give back the block that this share of the blocks in use comes before."""

    share: float


@dataclass(frozen=True)
class Empty:
    """Empty the cache."""


SIZES = st.one_of(
    st.integers(0, SMALL_SIZE),
    st.integers(SMALL_SIZE + 1, 4 * MIB),
    st.integers(SMALL_SIZE + 1, 64 * MIB),
    # Sizes that fill pages to the end, and that leave little of them.
    st.integers(2, 50).map(lambda units: units * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB, 20 * MIB - 512, 20 * MIB, 20 * MIB + 512, 60 * MIB]),
)
EVENT = st.one_of(*[SIZES] * 4, *[st.builds(Free, st.floats(0, 0.999))] * 3, st.just(Empty()))
EVENTS = st.one_of(st.lists(EVENT, max_size=20), st.lists(EVENT, min_size=30, max_size=90))


def start_of(size: int, address: int) -> int:
    """Bytes from the start of the pool's addresses."""
    return (address - (SMALL_BASE if size <= SMALL_SIZE else LARGE_BASE)) * MIN_BLOCK


def replay(
    allocator: CachingAllocator, reference: Reference, held: list[tuple[int, int]], events: Sequence[object]
) -> None:
    """Do the same to both and compare them after each event; `held` are blocks in use: size and address."""
    for event in events:
        reserved = reference.reserved_bytes
        if isinstance(event, int):
            size = rounded(event)
            pool = reference.pool(size)
            fits = pool.fits(size)
            address = allocator.allocate(event)
            assert start_of(size, address) == pool.allocate(size)
            assert (allocator.reserved_bytes > reserved) is (not fits)
            held.append((size, address))
        elif isinstance(event, Free) and held:
            size, address = held.pop(int(event.share * len(held)))
            del reference.pool(size).used[start_of(size, address)]
            allocator.free(address)
            assert allocator.reserved_bytes == reserved
        elif isinstance(event, Empty):
            reference.small.empty()
            reference.large.empty()
            allocator.empty_cache()
            assert allocator.reserved_bytes <= reserved
        assert allocator.reserved_bytes == reference.reserved_bytes
        assert allocator.allocated_bytes == reference.allocated_bytes == sum(size for size, _ in held)
        assert allocator.allocated_bytes <= allocator.reserved_bytes
        ends = sorted((address, address + size // MIN_BLOCK) for size, address in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_it_places_maps_and_unmaps_what_the_reference_does(events: list[object]) -> None:
    replay(ExpandableAllocator(), Reference(), [], events)


@settings(max_examples=100, deadline=None)
@given(EVENTS, EVENTS, EVENTS)
def test_what_is_done_to_a_copy_is_not_done_to_its_original(
    before: list[object], meanwhile: list[object], after: list[object]
) -> None:
    allocator, reference = ExpandableAllocator(), Reference()
    held: list[tuple[int, int]] = []
    replay(allocator, reference, held, before)
    other = allocator.copy()
    in_use = list(held)
    for event in meanwhile:
        if isinstance(event, int):
            in_use.append((event, other.allocate(event)))
        elif isinstance(event, Free) and in_use:
            other.free(in_use.pop(int(event.share * len(in_use)))[1])
        elif isinstance(event, Empty):
            other.empty_cache()
    replay(allocator, reference, held, after)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_with_everything_free_an_emptied_cache_has_nothing(events: list[object]) -> None:
    allocator, held = ExpandableAllocator(), []
    most = 0
    for event in events:
        if isinstance(event, int):
            held.append(allocator.allocate(event))
            most = max(most, allocator.allocated_bytes)
    assert allocator.peak_allocated_bytes == most
    for address in held:
        allocator.free(address)
    allocator.empty_cache()
    assert mib(allocator) == (0, 0)
    allocator.reset_peak()
    assert allocator.peak_allocated_bytes == 0
    fresh = ExpandableAllocator()
    for event in events:
        if isinstance(event, int):
            assert allocator.allocate(event) == fresh.allocate(event)


SIZES = (1, 700, 2048, 2049, 5000, 20_000, 90_000)
"""In units of 512 bytes: of both pools, and larger than a page."""


@st.composite
def passes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    """Events on block 0, which is there before, and on others; and the sizes of those."""
    sizes, events, alive = [0], [], []
    for _ in range(draw(st.integers(12, 30))):
        if not alive or draw(st.booleans()):
            alive.append(len(sizes))
            events.append(len(sizes))
            sizes.append(draw(st.sampled_from(SIZES)))
        else:
            events.append(-1 - alive.pop(draw(st.integers(0, len(alive) - 1))))
    if draw(st.booleans()):
        events.append(-1)
    return tuple(events), sizes


@settings(max_examples=60)
@given(
    one=passes(),
    given_units=st.sampled_from(SIZES),
    others=st.lists(st.tuples(st.sampled_from(SIZES), st.booleans()), max_size=12),
    between=st.lists(
        st.sampled_from(("nothing", "nothing", "free", "take", "empty")), min_size=6, max_size=20
    ),
)
def test_a_pass_that_comes_again_is_replayed_as_if_it_never_had(
    one: tuple[tuple[int, ...], list[int]],
    given_units: int,
    others: list[tuple[int, bool]],
    between: list[str],
) -> None:
    """Layers one after the other, on what was allocated and freed before and is in between."""
    events, units = one
    remembering, forgetful = ExpandableAllocator(), ExpandableAllocator()
    known = Pass(events, units)
    left: list[int] = []

    def on_both(size: int) -> int:
        address = remembering.allocate(size * MIN_BLOCK)
        assert forgetful.allocate(size * MIN_BLOCK) == address
        return address

    blocks = [(on_both(size), freed) for size, freed in others]
    for address in [address for address, freed in blocks if freed]:
        remembering.free(address)
        forgetful.free(address)
    for what in between:
        own = [on_both(given_units)] + [0] * (len(units) - 1)
        again = own.copy()
        remembering.play(known, own)
        forgetful.play(Pass(events, units), again)
        alive = set(range(len(units))) - {-1 - event for event in events if event < 0}
        assert [own[block] for block in alive] == [again[block] for block in alive]
        left += [own[block] for block in alive]
        assert state(remembering) == state(forgetful)
        if what == "free" and left:
            address = left.pop(0)
            remembering.free(address)
            forgetful.free(address)
        elif what == "take":
            left.append(on_both(given_units))
        elif what == "empty":
            remembering.empty_cache()
            forgetful.empty_cache()


def state(allocator: ExpandableAllocator) -> tuple[int, int, int]:
    """What is told of an allocator."""
    return allocator.allocated_bytes, allocator.reserved_bytes, allocator.peak_allocated_bytes


def test_a_pass_is_not_replayed_from_a_state_in_which_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that leave one block each, which is let go three layers later, as offloading does."""
    events, units = (1, 2, 3, -1 - 2, 4, -1 - 3, -1 - 4), [0, 5000, 20_000, 2049, 90_000]
    played = []
    allocator, known = ExpandableAllocator(), Pass(events, units)
    play = AddressRange.play
    monkeypatch.setattr(AddressRange, "play", lambda self, *what: played.append(what) or play(self, *what))
    left: list[int] = []
    for _ in range(40):
        own = [0] * 5
        allocator.play(known, own)
        left.append(own[1])
        if len(left) > 3:
            allocator.free(left[-4])
    assert 3 <= len(played) <= 8
    assert left[12:24] == left[24:36]


def test_a_block_that_is_freed_beside_a_free_one_is_joined_with_it_however_the_pass_came_before() -> None:
    size, events = 5000, (*(1, -2) * 6, -1)
    allocator, known = ExpandableAllocator(), Pass(events, [0, 90_000])
    first, _, second, beside, _ = (allocator.allocate(size * MIN_BLOCK) for _ in range(5))
    allocator.play(known, [first, 0])
    allocator.free(beside)
    allocator.play(known, [second, 0])
    assert allocator.allocate(2 * size * MIN_BLOCK) == second
