"""The next setup down: it needs less, and what is learned stays."""

from __future__ import annotations

import pytest

from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.planning.make_plan import make_plan
from planner.planning.step_down import CPU_KEEPS, EXECUTION_KNOBS, SHARES_LEFT, changes_in_words, step_down
from planner.setup.request import PlanRequest
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup


@pytest.mark.parametrize(("model", "card"), [("llama-3.1-8b", "16GB"), ("qwen2.5-14b", "24GB")])
def test_it_needs_less_and_learns_the_same(model: str, card: str) -> None:
    plan = make_plan(PlanRequest(model=model, gpu=card), whole=False)
    spec, target = resolve_model(model), resolve_gpu(card)
    before, needed = plan.setup, plan.memory.peak_upper_bytes
    for _ in range(2):
        found = step_down(before, spec, target.spec, usable_bytes=target.usable_bytes)
        assert found is not None
        assert found.peak_upper_bytes <= SHARES_LEFT[-1] * needed
        assert found.setup.effective_batch_size == before.effective_batch_size
        differ = {name for name in FIELD_NAMES if getattr(found.setup, name) != getattr(before, name)}
        assert differ
        assert differ <= set(EXECUTION_KNOBS)
        assert all(name in found.changes for name in differ)
        before, needed = found.setup, found.peak_upper_bytes


def test_a_run_on_the_cpu_gets_nothing_that_only_a_gpu_has() -> None:
    spec, target = resolve_model("llama-3.1-8b"), resolve_gpu("16GB")
    setup = TrainingSetup(model="llama-3.1-8b", max_length=2048, per_device_train_batch_size=4)
    found = step_down(setup, spec, target.spec, usable_bytes=target.usable_bytes, keep=CPU_KEEPS)
    assert found is not None
    assert found.setup.compile == "none"
    assert not found.setup.activation_offloading
    assert found.setup.effective_batch_size == 4


def test_the_leanest_has_nothing_below_it() -> None:
    spec, target = resolve_model("llama-3.1-8b"), resolve_gpu("16GB")
    setup = TrainingSetup(
        model="llama-3.1-8b", max_length=8192, gradient_checkpointing=True, activation_offloading=True
    )
    assert step_down(setup, spec, target.spec, usable_bytes=target.usable_bytes) is None


def test_changes_are_told_by_the_knobs_own_names() -> None:
    before = TrainingSetup(model="demo", max_length=64, per_device_train_batch_size=8)
    after = before.replace(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert changes_in_words(before, after) == (
        "per_device_train_batch_size 8 -> 4, gradient_accumulation_steps 1 -> 2"
    )
    assert changes_in_words(before, before) == ""
