"""What batching does to data of many lengths: padding, grouping, packing, and the time of an epoch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.data.batches import Lengths, padding
from planner.data.lengths import DatasetStats
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate, estimate_step
from planner.throughput.epoch import Examples

MODEL = "llama-3.1-8b"


def make_stats(lengths: list[int]) -> DatasetStats:
    return DatasetStats.from_lengths(
        lengths, loss_tokens=0, loss_on="all", data_format="text", estimated=False
    )


def chat_lengths(count: int, seed: int = 3) -> list[int]:
    """From 50 to 4,000 tokens, most of them short, as chats are."""
    rng = random.Random(seed)
    return [min(4000, max(50, int(rng.lognormvariate(6.0, 0.9)))) for _ in range(count)]


def make_setup(**changes: object) -> TrainingSetup:
    return TrainingSetup.from_dict(
        {
            "model": MODEL,
            "max_length": 4096,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            **changes,
        }
    )


def step_at(setup: TrainingSetup) -> StepEstimate:
    return estimate_step(
        TrainingRun(setup=setup, model=resolve_model(MODEL), padded=not setup.packing),
        resolve_gpu("h100-80gb").spec,
    )


@pytest.mark.parametrize("size", [1, 2, 8, 64])
@pytest.mark.parametrize("max_length", [300, 4096])
def test_random_batches_are_as_long_as_the_whole_distribution_says(size: int, max_length: int) -> None:
    stats = make_stats(chat_lengths(3000))
    lengths = Lengths(stats, max_length)
    exact = stats.padding(size, max_length)
    coarse = padding(lengths, lengths.random_batches(size))
    assert coarse.real_tokens == exact.real_tokens
    assert coarse.expected_longest == pytest.approx(exact.expected_longest, rel=0.01)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=300),
    size=st.integers(1, 16),
    accumulated=st.integers(1, 8),
    max_length=st.integers(1, 3000),
)
@settings(max_examples=150, deadline=None)
def test_batches_lie_within_the_data(
    lengths: list[int], size: int, accumulated: int, max_length: int
) -> None:
    found = Lengths(make_stats(lengths), max_length)
    least, most = min(min(lengths), max_length), min(max(lengths), max_length)
    for batches in (found.random_batches(size), found.grouped_batches(size, size * accumulated)):
        assert sum(batch.share for batch in batches) == pytest.approx(1.0)
        assert all(least <= batch.longest <= most for batch in batches)
        assert all(one.longest <= other.longest for one, other in pairwise(batches))
        assert padding(found, batches).processed_tokens >= found.tokens
    assert found.tokens == sum(min(length, max_length) for length in lengths)
    assert found.cut == sum(length >= max_length for length in lengths)


def test_grouping_pads_least_and_random_batches_most() -> None:
    examples = Examples(make_stats(chat_lengths(5000)))
    found = {
        strategy: examples.epoch(make_setup(train_sampling_strategy=strategy), step_at(make_setup()), step_at)
        for strategy in ("random", "group_by_length")
    }
    random_epoch, grouped = found["random"], found["group_by_length"]
    assert random_epoch is not None
    assert grouped is not None
    assert grouped.processed_tokens < 1.1 * grouped.real_tokens
    assert random_epoch.processed_tokens > 1.7 * random_epoch.real_tokens
    assert grouped.seconds < random_epoch.seconds
    assert grouped.steps == random_epoch.steps == -(-5000 // 16)
    assert grouped.useful_tokens_per_second == grouped.real_tokens / grouped.seconds


def test_a_step_of_many_lengths_is_not_a_step_of_their_mean() -> None:
    """Short batches wait for the host: the mean of their times is above the time of the mean length."""
    examples = Examples(make_stats([64] * 500 + [4000] * 500))
    setup = make_setup(per_device_train_batch_size=1, gradient_accumulation_steps=16)
    epoch = examples.epoch(setup, step_at(setup), step_at)
    assert epoch is not None
    by_hand = sum(step_at(setup.replace(max_length=n)).seconds_per_micro_step for n in (64, 4000)) * 500
    at_mean = step_at(setup.replace(max_length=2032)).seconds_per_micro_step * 1000
    assert epoch.seconds == pytest.approx(by_hand, rel=0.05)
    assert epoch.seconds > 1.02 * at_mean


def test_short_batches_have_the_interval_of_what_waits_for_the_host() -> None:
    def parts(length: int) -> tuple[float, float]:
        examples = Examples(make_stats([length - 1] * 500 + [length] * 500))
        setup = make_setup(per_device_train_batch_size=1, gradient_accumulation_steps=16, compile="regional")
        full = step_at(setup)
        assert full.bound_by == "compute"
        epoch = examples.epoch(setup, full, step_at)
        assert epoch is not None
        return epoch.seconds_low / epoch.seconds, epoch.seconds_high / epoch.seconds

    short, long = parts(64), parts(4000)
    assert short[0] < long[0] < 1 < long[1] < short[1]


def test_packed_rows_take_the_time_of_full_ones() -> None:
    stats = make_stats(chat_lengths(4000))
    examples = Examples(stats)
    setup = make_setup(
        packing=True,
        attn_implementation="flex_attention",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    speed = step_at(setup)
    epoch = examples.epoch(setup, speed, step_at)
    rows = stats.packing(4096).sequences
    assert epoch is not None
    assert epoch.steps == -(-rows // 2)
    assert epoch.processed_tokens == rows * 4096
    assert epoch.seconds == pytest.approx(rows * 4096 / speed.tokens_per_second, rel=0.01)
    assert examples.examples_per_row(setup) == pytest.approx(4000 / rows)
    assert epoch.seconds_low < epoch.seconds < epoch.seconds_high
