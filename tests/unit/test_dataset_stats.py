from __future__ import annotations

import json
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.base.errors import InputError
from planner.data.lengths import DatasetStats

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def make(lengths: list[int]) -> DatasetStats:
    return DatasetStats.from_lengths(
        lengths, loss_tokens=sum(lengths), loss_on="all", data_format="text", estimated=False
    )


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    spaces: list[int] = []
    for length in sorted((min(length, capacity) for length in lengths), reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - length)
        else:
            spaces.append(capacity - length)
    return len(spaces)


def test_totals_and_percentiles_of_known_lengths() -> None:
    stats = make([*range(1, 101)])
    assert (stats.examples, stats.total_tokens, stats.longest) == (100, 5050, 100)
    assert (stats.percentile(0), stats.percentile(50), stats.percentile(95), stats.percentile(100)) == (
        1,
        50,
        95,
        100,
    )


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 400))
def test_truncation_counts_what_is_cut(lengths: list[int], limit: int) -> None:
    truncation = make(lengths).truncation(limit)
    assert truncation.examples == sum(length > limit for length in lengths)
    assert truncation.tokens == sum(lengths) - sum(min(length, limit) for length in lengths)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 400))
def test_packing_makes_as_many_sequences_as_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    packing = make(lengths).packing(capacity)
    assert packing.sequences == best_fit_decreasing(lengths, capacity)
    assert packing.real_tokens == sum(min(length, capacity) for length in lengths)
    assert 0 < packing.fill <= 1


def test_padding_is_what_random_batches_cost() -> None:
    rng = random.Random(1)
    lengths = [rng.choice([20, 50, 400]) for _ in range(5000)]
    padding = make(lengths).padding(8, 300)
    clipped = [min(length, 300) for length in lengths]
    simulated = statistics.mean(8 * max(rng.choices(clipped, k=8)) for _ in range(20_000)) * len(lengths) / 8
    assert padding.processed_tokens == pytest.approx(simulated, rel=0.01)
    assert padding.real_tokens == sum(clipped)


def test_batches_of_one_need_no_padding() -> None:
    padding = make([3, 5, 9]).padding(1, 100)
    assert padding.processed_tokens == padding.real_tokens == 17
    assert padding.waste == 0


@settings(deadline=None)
@given(LENGTHS)
def test_json_round_trip(lengths: list[int]) -> None:
    stats = make(lengths)
    assert DatasetStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"schema_version": 1},
        {"schema_version": 1, "lengths": [[1, 2, 3]]},
        {"schema_version": 1, "lengths": [[5, 1], [4, 1]], "loss_tokens": 1, "loss_on": "all"},
    ],
)
def test_broken_json_is_refused_in_one_line(broken: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        DatasetStats.from_dict(broken)
    assert "\n" not in str(caught.value)


def test_no_example_and_empty_examples_are_refused() -> None:
    with pytest.raises(InputError):
        make([])
    with pytest.raises(InputError, match="length"):
        make([0, 4])
