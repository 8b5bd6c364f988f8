"""torch's caching allocator as it is by default, and the tape of allocations, as replayed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.allocators.expandable import empty_allocator
from planner.memory.allocators.native import (
    LARGE_SEGMENT,
    MIB,
    MIN_LARGE_ALLOCATION,
    CachingAllocator,
    rounded,
)
from planner.memory.tape.tape import Size, Tape, Value, prune
from planner.setup.cuda_allocator import ALLOCATORS


def segment_size(size_bytes: int) -> int:
    """What the driver is asked for when nothing cached serves a request."""
    allocator = CachingAllocator()
    allocator.allocate(size_bytes)
    return allocator.reserved_bytes


@pytest.mark.parametrize(("asked", "block"), [(0, 512), (1, 512), (512, 512), (513, 1024), (MIB, MIB)])
def test_requests_round_to_512_bytes(asked: int, block: int) -> None:
    assert rounded(asked) == block


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ],
)
def test_segments_come_in_three_sizes(asked: int, segment: int) -> None:
    assert segment_size(asked) == segment


def test_a_small_block_is_split_from_its_segment() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB, 2 * MIB)
    allocator.allocate(1)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB + 512, 4 * MIB)


def test_a_tail_of_up_to_1_mib_counts_as_allocated() -> None:
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (12 * MIB, 12 * MIB)
    other = CachingAllocator()
    other.allocate(11 * MIB - 512)
    assert (other.allocated_bytes, other.reserved_bytes) == (11 * MIB - 512, 12 * MIB)


def test_free_neighbours_merge_and_are_used_again() -> None:
    allocator = CachingAllocator()
    first, second, third = (allocator.allocate(5 * MIB) for _ in range(3))
    allocator.free(first)
    allocator.free(third)
    allocator.free(second)
    allocator.allocate(19 * MIB)
    # The three lie in one segment of 20 MiB; merged, it serves 19, whose tail of 1 MiB is not split off.
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (LARGE_SEGMENT, LARGE_SEGMENT)
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 2 * LARGE_SEGMENT


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(12 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(12 * MIB) == small


def test_an_emptied_cache_gives_back_segments_that_are_wholly_free() -> None:
    allocator = CachingAllocator()
    freed, held = allocator.allocate(4 * MIB), allocator.allocate(4 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.free(freed)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (4 * MIB, 20 * MIB)
    assert allocator.allocate(4 * MIB) == freed
    allocator.free(held)


@settings(deadline=None)
@given(st.lists(st.integers(MIN_LARGE_ALLOCATION, 64 * MIB), min_size=2, max_size=20), st.data())
def test_blocks_never_merge_across_segments(sizes: list[int], data: st.DataObject) -> None:
    """Freed in any order, segments that were asked for one after the other serve one request each."""
    allocator = CachingAllocator()
    segments = [segment_size(size) for size in sizes]
    # Of the segments' own sizes: no rest of one serves another.
    held = [allocator.allocate(segment) for segment in segments]
    assert allocator.reserved_bytes == sum(segments)
    for address in data.draw(st.permutations(held)):
        allocator.free(address)
    for segment in data.draw(st.permutations(segments)):
        allocator.allocate(segment)
    assert allocator.allocated_bytes == allocator.reserved_bytes == sum(segments)
    larger = segment_size(max(segments) + 1)
    other = CachingAllocator()
    for address in [other.allocate(segment) for segment in segments]:
        other.free(address)
    other.allocate(larger)
    assert other.reserved_bytes == sum(segments) + larger
    other.empty_cache()
    assert other.reserved_bytes == larger


@settings(deadline=None)
@given(
    st.sampled_from(ALLOCATORS),
    st.lists(st.integers(1, 64 * MIB), max_size=40),
    st.randoms(use_true_random=False),
)
def test_bytes_are_never_lost(name: str, sizes: list[int], random: object) -> None:
    allocator = empty_allocator(name)
    held = [allocator.allocate(size) for size in sizes]
    assert sum(map(rounded, sizes)) <= allocator.allocated_bytes <= allocator.reserved_bytes
    assert len(set(held)) == len(held)
    reserved = allocator.reserved_bytes
    random.shuffle(held)  # type: ignore[attr-defined]
    for address in held:
        allocator.free(address)
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == reserved
    for size in sorted(sizes, reverse=True):
        allocator.allocate(size)


def sizes_of(tape: Tape) -> tuple[float, ...]:
    return tuple(sum(size.at(10, 100) for size in moment) for moment in tape.moments())


def test_the_tape_counts_holders() -> None:
    tape = Tape(saves=True)
    buffer = tape.tokens(2)
    saved = tape.save(buffer)
    tape.free(buffer)
    assert sum(size.at(10, 0) for size in tape.live) == 20
    tape.free(saved, None)
    assert sum(size.at(10, 0) for size in tape.live) == 0
    assert Tape(saves=False).save(Tape(saves=False).tokens(1)) is None


def test_the_tape_notes_the_peak() -> None:
    tape = Tape(saves=True)
    first = tape.tokens(1)
    second = tape.allocate(Size(constant=5, per_score=1))
    tape.free(first, second)
    tape.free(tape.fixed(3))
    assert max(sizes_of(tape)) == 10 + 5 + 100


def test_gradients_add_in_place_unless_they_are_views() -> None:
    for view, extra in ((False, 0), (True, 10)):
        tape = Tape(saves=True)
        value = Value(tape.tokens(0), True)
        tape.add_grad(value, tape.tokens(1), view=view)
        tape.add_grad(value, tape.tokens(1))
        assert max(sizes_of(tape)) == 20 + extra
        tape.free(tape.take_grad(value))
        assert sum(size.at(10, 0) for size in tape.live) == 0


def test_a_gradient_nobody_wants_is_dropped() -> None:
    tape = Tape(saves=True)
    value = Value(tape.tokens(0), False)
    tape.add_grad(value, tape.tokens(1))
    assert value.grad is None
    assert sum(size.at(10, 0) for size in tape.live) == 0
    with pytest.raises(AssertionError, match="gradient"):
        tape.take_grad(value)


def test_nodes_run_last_first_and_early_stop_forgets() -> None:
    tape = Tape(saves=True)
    order: list[int] = []
    tape.nodes += [lambda: order.append(1), lambda: order.append(2)]
    tape.save(tape.tokens(1))
    tape.free(tape.tokens(5))
    tape.stop_after_last_save()
    assert max(sizes_of(tape)) == 10
    tape.forget_moments()
    tape.backward()
    assert order == [2, 1]
    assert sizes_of(tape) == (10.0,)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(0, 100) for _ in range(9)]),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 1000),
    st.integers(0, 1000),
)
def test_pruning_keeps_every_peak(moments: list[tuple[float, ...]], tokens: int, scores: int) -> None:
    def size(values: tuple[float, ...]) -> float:
        return sum(values[0::3]) + tokens * sum(values[1::3]) + scores * sum(values[2::3])

    kept = [sum(part.at(tokens, scores) for part in moment) for moment in prune(moments)]
    assert max(kept) == pytest.approx(max(map(size, moments)))
