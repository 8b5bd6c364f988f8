"""TrainingRun: what follows from a setup and a model is worked out once, and two models share no answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from planner.gpus.target import resolve_gpu
from planner.memory import estimate_memory
from planner.models.catalog import list_models, load_shipped
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup import run as runs
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import estimate_step

DERIVED = ("attention_implementation", "attention_kernel", "mask_windows", "micro_step", "adapter_of")
H100 = resolve_gpu("h100-80gb").spec


def setup_of(model: str, **knobs: Any) -> TrainingSetup:
    return TrainingSetup(model=model, max_length=2048, **knobs)


def test_a_plan_works_out_each_fact_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run and of each kind of its layers: not once for memory, once for speed and again for the text."""
    asked: Counter[tuple[object, ...]] = Counter()
    made: Counter[tuple[TrainingSetup, bool]] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(setup: TrainingSetup, *rest: Any, **options: Any) -> Any:
            layer = rest[0].indices if name == "attention_kernel" else None
            asked[name, setup, layer, options.get("padded")] += 1
            return function(setup, *rest, **options)

        return call

    make = TrainingRun.__init__

    def count(self: TrainingRun, **fields: Any) -> None:
        make(self, **fields)
        made[self.setup, self.padded] += 1

    for name in DERIVED:
        monkeypatch.setattr(runs, name, counted(name, getattr(runs, name)))
    monkeypatch.setattr(TrainingRun, "__init__", count)
    # As in a process that has planned nothing yet.
    monkeypatch.setattr(runs, "_kinds", {})
    make_plan(make_request("qwen2.5-14b", gpu="16GB"), whole=False)
    assert made
    # A smaller model of the family is advised by runs of its own.
    assert max(made.values()) == 1, made.most_common(3)
    for (name, setup, *_), times in asked.items():
        assert times <= sum(made[setup, padded] for padded in (False, True)), (name, times, setup)
    assert {name for name, *_ in asked} == set(DERIVED)


def test_two_models_of_one_id_and_size_get_two_answers() -> None:
    """A folder whose config was edited, or two folders of one name, in one process."""
    model = load_shipped("qwen2.5-7b")
    other: ModelSpec = replace(
        model,
        parameters=tuple(
            replace(p, module_class="Embedding") if p.kind == "weight" and p.module_name == "down_proj" else p
            for p in model.parameters
        ),
    )
    assert (model.id, model.parameter_count) == (other.id, other.parameter_count)
    setup = setup_of("qwen2.5-7b", target_modules=["q_proj", "v_proj"])
    for replay in (False, True):
        first, second, again = (
            estimate_memory(TrainingRun(setup=setup, model=one), gpu=H100, replay=replay).allocated_bytes
            for one in (model, other, model)
        )
        assert first == again
        # down_proj stays in 16 bits: of 28 layers, 3,584 x 18,944 elements, at 1.5 bytes more.
        assert second - first > 28 * 3584 * 18944


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_memory_and_speed_know_runs_by_their_models(method: str) -> None:
    """What is remembered of one model is never given for another: together as apart."""
    names = [summary.id for summary in list_models()][::12]
    apart = {}
    for name in names:
        run = TrainingRun(setup=setup_of(name, method=method, kernels="none"), model=load_shipped(name))
        apart[name] = estimate_memory(run).process_bytes, estimate_step(run, H100).seconds_per_micro_step
    for name in reversed(names):
        run = TrainingRun(setup=setup_of(name, method=method, kernels="none"), model=load_shipped(name))
        found = estimate_memory(run).process_bytes, estimate_step(run, H100).seconds_per_micro_step
        assert found == apart[name]


def test_equal_runs_are_one_key_and_models_equal_only_in_id_are_two() -> None:
    model = load_shipped("llama-3.2-1b")
    setup = setup_of("llama-3.2-1b")
    assert TrainingRun(setup=setup, model=model) == TrainingRun(setup=setup, model=replace(model))
    assert hash(TrainingRun(setup=setup, model=model)) == hash(TrainingRun(setup=setup, model=replace(model)))
    assert model != replace(model, vocab_size=model.vocab_size + 1)
    assert hash(model) != hash(replace(model, vocab_size=model.vocab_size + 1))
    assert TrainingRun(setup=setup, model=model) != TrainingRun(setup=setup, model=model, padded=True)
