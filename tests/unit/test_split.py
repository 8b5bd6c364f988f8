"""What of the data is evaluated on and not trained."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs.training_job import TrainingJob
from launcher.training.split import Split, key_of
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup

KEYS = [key_of([number, number + 1]) for number in range(200)]


@pytest.mark.parametrize(("wanted", "count"), [(0.05, 10), (0.5, 100), (1, 1), (7, 7), (0.001, 1)])
def test_a_share_or_a_number_of_examples_is_taken(wanted: float, count: int) -> None:
    taken = Split(wanted, 42).evaluated(KEYS, "d")
    assert len(taken) == count
    assert taken < set(range(len(KEYS)))


def test_the_choice_is_the_seeds_alone_and_not_the_first_examples() -> None:
    taken = Split(20, 42).evaluated(KEYS, "d")
    assert taken == Split(20, 42).evaluated(list(KEYS), "elsewhere")
    assert taken != Split(20, 43).evaluated(KEYS, "d")
    assert taken != frozenset(range(20))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 12), min_size=4, max_size=60),
    st.one_of(st.integers(1, 60), st.floats(0.01, 0.9)),
    st.integers(0, 2**32 - 1),
)
def test_copies_of_an_example_are_never_on_both_sides(texts: list[int], wanted: float, seed: int) -> None:
    keys = [key_of([text]) for text in texts]
    try:
        taken = Split(wanted, seed).evaluated(keys, "d")
    except InputError:
        return
    trained = {keys[place] for place in range(len(keys)) if place not in taken}
    assert trained
    assert trained.isdisjoint(keys[place] for place in taken)
    assert 0 < len(taken) <= max(1, round(wanted * len(keys)) if wanted < 1 else wanted)


@pytest.mark.parametrize(("wanted", "said"), [(200, "leaves nothing"), (0.999, "leaves nothing")])
def test_a_split_that_leaves_nothing_to_train_is_refused(wanted: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Split(wanted, 1).evaluated(KEYS, "d")


def test_data_that_is_one_example_over_and_over_cannot_be_split() -> None:
    with pytest.raises(InputError, match="alike"):
        Split(0.1, 1).evaluated([KEYS[0]] * 50, "d")


SETUP = TrainingSetup(model="m", max_length=64)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eval_split": 0.1, "eval_data_path": "e"}, "--eval-split and --eval-data exclude each other"),
        ({"eval_split": 0.0}, "--eval-split"),
        ({"eval_split": 1.5}, "a share between 0 and 1, or a number of examples"),
        ({"eval_split": -1}, "--eval-split"),
        ({"eval_steps": 5}, "--eval-steps needs something to evaluate on"),
        ({"early_stopping_patience": 2}, "--early-stopping-patience needs something to evaluate on"),
        ({"early_stopping_patience": 0, "eval_split": 0.1}, "early_stopping_patience"),
    ],
)
def test_a_job_refuses_an_evaluation_that_contradicts_itself(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainingJob(setup=SETUP, model_source="m", data_path="d", **values)


@pytest.mark.parametrize("split", [0.05, 16, None])
def test_the_split_is_kept_in_the_job(split: float | None) -> None:
    job = TrainingJob(setup=SETUP, model_source="m", data_path="d", eval_split=split)
    assert TrainingJob.from_dict(job.to_dict()) == job
