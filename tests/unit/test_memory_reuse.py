"""Buffers of compiled graphs that later ones take over, as torch's inductor plans it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.allocators.native import MIB
from planner.memory.decoder.buffer_reuse import placed, reuse, tuned
from planner.memory.decoder.program import Program
from planner.memory.decoder.programs import group_program
from planner.memory.step.replay import replay_steps
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from tests.unit.test_memory_replay import H100, parts_of, setup_of

EMPTY = Program(
    blocks=(),
    forward=(),
    backward=(),
    checkpointed=False,
    keeps_input=False,
    recomputed=0,
    unpacked=0,
    first_product=0,
    output=0,
    incoming=0,
    outgoing=None,
    gradients=(),
    casts=(),
    kept=(),
    kept_once=(),
)
MODELS = ("llama-3.2-1b", "qwen3-0.6b", "phi-4-mini", "gemma-3-1b", "granite-3.3-2b")
COMPILED: tuple[dict[str, object], ...] = (
    {"gradient_checkpointing": False},
    {},
    {"selective_checkpointing": True},
    {"gradient_checkpointing": False, "activation_memory_budget": 0.3},
    {"gradient_checkpointing": False, "method": "lora"},
    {"gradient_checkpointing": False, "lora_dropout": 0.05},
    {"gradient_checkpointing": False, "method": "full", "optim": "adamw_torch"},
)


def free(block: int) -> int:
    return -1 - block


def program(**changes: object) -> Program:
    return dataclasses.replace(EMPTY, **changes)


def test_a_later_kernel_takes_the_last_buffer_of_its_size_that_was_freed() -> None:
    events = [0, 1, 2, free(0), free(1), 3, free(2), free(3)]
    found = reuse(events, [8, 8, 8, 8], program())
    assert found.places == {3: 1}
    assert found.events == (0, 1, 2, free(0), free(2), free(1))
    assert [found.left[count] for count in (0, 3, 6, 8)] == [0, 3, 4, 6]


def test_another_size_or_dtype_or_an_operators_own_output_takes_nothing() -> None:
    events = [0, free(0), 1, free(1)]
    for found in (
        reuse(events, [8, 16], program()),
        reuse(events, [8, 8], program(foreign=frozenset({1}))),
        reuse(events, [8, 8], program(inner=frozenset({0}))),
        reuse(events, [8, 8], program(single=frozenset({0}))),
    ):
        assert found.places == {}
        assert found.events == tuple(events)


def test_what_an_operator_returned_is_taken() -> None:
    assert reuse([0, free(0), 1], [8, 8], program(foreign=frozenset({0}))).places == {1: 0}


def test_a_buffer_from_before_the_graph_is_not_taken() -> None:
    """Only what a graph has made itself lies in its pool."""
    assert reuse([1, free(0), 2], [8, 8, 8], program()).places == {}


def test_a_buffer_is_not_kept_over_the_graphs_peak() -> None:
    events = [0, free(0), 1, free(1), 2]
    assert reuse(events, [8, 100, 8], program()).places == {}
    assert reuse(events, [8, 100, 8], program(inner=frozenset({1}))).places == {2: 0}


def test_what_was_taken_can_be_taken_again() -> None:
    found = reuse([0, free(0), 1, free(1), 2, free(2)], [8, 8, 8], program())
    assert found.places == {1: 0, 2: 0}
    assert found.events == (0, free(0))


def test_a_new_kernel_is_timed_with_its_outputs_there() -> None:
    """Blocks 2 and 4 are an operator's own, and what that needs in between."""
    made = program(
        blocks=((0.0, 1.0, 0.0),) * 5,
        forward=(1, 4, 2, free(4), 3, free(1), free(3)),
        backward=(1, free(1)),
        first_product=3,
        unpacked=1,
        foreign=frozenset({2}),
        inner=frozenset({4}),
    )
    found = tuned(made, 100, forward=True, backward=False)
    buffer = len(made.blocks)
    assert found.blocks[buffer] == (100.0, 0.0, 0.0)
    assert found.forward == (1, 4, 2, free(4), 3, buffer, free(buffer), free(1), free(3))
    assert (found.backward, found.unpacked, found.first_product) == (made.backward, 1, 3)
    found = tuned(made, 100, forward=False, backward=True)
    assert found.forward == made.forward
    assert (found.backward, found.unpacked) == ((1, buffer, free(buffer), free(1)), 3)


def test_only_the_first_step_times_kernels_and_a_larger_cache_reserves_more() -> None:
    setup = setup_of(
        "llama-3.2-1b", compile="regional", gradient_checkpointing=False, per_device_train_batch_size=4
    )
    reserved = []
    for cache in (2**20, 128 * 2**20):
        gpu = dataclasses.replace(H100, l2_cache_bytes=cache)
        found = replay_steps(
            TrainingRun(setup=setup, model=load_shipped(setup.model), padded=False),
            gpu=gpu,
            allocator=EXPANDABLE,
        )
        reserved.append((found.step_allocated_bytes, found.step_reserved_bytes))
    (small, few), (large, many) = reserved
    # The peak of a step is that of steady state; what the first one reserved stays.
    assert small == large
    assert 40 * MIB <= many - few <= 140 * MIB


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Events of up to 30 blocks, and their sizes."""
    count = draw(st.integers(1, 30))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 8]), min_size=count, max_size=count))
    events: list[int] = []
    live: list[int] = []
    for block in range(count):
        for _ in range(draw(st.integers(0, 2))):
            if live:
                events.append(free(live.pop(draw(st.integers(0, len(live) - 1)))))
        events.append(block)
        live.append(block)
    return events, sizes


def holdings(events: Iterable[int], held: Iterable[int] = ()) -> list[set[int]]:
    """The blocks that are held at first and after each event."""
    found = [set(held)]
    for event in events:
        before = found[-1]
        if event >= 0:
            assert event not in before
            found.append(before | {event})
        else:
            assert -1 - event in before
            found.append(before - {-1 - event})
    return found


def live_bytes(events: Iterable[int], sizes: list[int]) -> list[int]:
    return [sum(sizes[block] for block in held) for held in holdings(events)]


@settings(deadline=None)
@given(graphs())
def test_reuse_leaves_peak_and_end_as_they_were(graph: tuple[list[int], list[int]]) -> None:
    events, sizes = graph
    found = reuse(events, sizes, program())
    before, after = live_bytes(events, sizes), live_bytes(found.events, sizes)
    assert max(after) == max(before)
    assert after[-1] == before[-1]
    assert found.left[-1] == len(found.events) <= len(events)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("knobs", COMPILED, ids=str)
def test_a_placed_program_holds_and_leaves_as_much(model: str, knobs: dict[str, object]) -> None:
    for part in parts_of(setup_of(model, compile="regional", **knobs)):
        plain = group_program(part, accumulating=part.knobs.default.accumulating)
        tokens, scores = 2048, 1024**2
        found = placed(plain, tokens, scores)
        units = plain.units(tokens, scores)
        for before, after in ((plain.kept, found.kept), (plain.gradients, found.gradients)):
            assert sorted(units[block] for block in before) == sorted(units[block] for block in after)
        assert units[found.output] == units[plain.output]
        assert (found.outgoing is None) == (plain.outgoing is None)
        # Every pass starts from and ends at the same blocks, as the allocator's replay wants it.
        held = holdings(found.forward, {0})[-1] - {found.output, *found.casts}
        assert held == set(found.kept)
        held = holdings(found.backward, held | {found.incoming})[-1]
        left = {*found.gradients} | ({found.outgoing} if found.outgoing is not None else set())
        assert held == left
        if not part.knobs.default.trained:
            assert len(found.forward) + len(found.backward) < len(plain.forward) + len(plain.backward)
