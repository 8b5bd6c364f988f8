"""Tasks beside supervised fine-tuning: what a plan and an estimate say of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.training.build import refuse_task
from planner.base.errors import InputError, NotModelledError
from planner.gpus.catalog import gpu_catalog
from planner.memory import estimate_memory
from planner.models.catalog import load_shipped
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.roofline import estimate_step

MODEL = load_shipped("llama-3.1-8b")
H100 = gpu_catalog().get("h100-80gb")


def run_of(task: str, **knobs: Any) -> TrainingRun:
    setup = TrainingSetup(model=MODEL.id, max_length=1024, task=task, optim="adamw_torch_fused", **knobs)
    return TrainingRun(setup=setup, model=MODEL)


def weights(run: TrainingRun) -> int:
    found = estimate_memory(run, gpu=H100).components
    return next(part.size_bytes for part in found if part.name == "weights_unquantized")


def test_a_second_model_is_there_where_no_adapter_can_be_disabled() -> None:
    alone = weights(run_of("sft", method="full"))
    assert 1.99 * alone < weights(run_of("dpo", method="full")) <= 2.01 * alone
    assert weights(run_of("dpo", method="full", precompute_ref_log_probs=True)) == alone
    assert weights(run_of("dpo", method="lora")) == weights(run_of("sft", method="lora"))
    head = MODEL.vocab_size * MODEL.hidden_size * 2
    assert weights(run_of("reward", method="lora")) == alone - head + MODEL.hidden_size * 2


def test_passes_that_keep_nothing_take_time() -> None:
    """A pair is two sequences; checkpointed and frozen, a micro-step is about three forward passes."""
    seconds = {
        task: estimate_step(run_of(task, per_device_train_batch_size=size), H100).seconds_per_micro_step
        for task, size in (("sft", 2), ("dpo", 1), ("kto", 2), ("reward", 1))
    }
    assert seconds["dpo"] / seconds["sft"] == pytest.approx(4 / 3, rel=0.1)
    assert seconds["kto"] / seconds["sft"] == pytest.approx(6 / 3, rel=0.1)
    assert seconds["reward"] < 1.05 * seconds["sft"]
    before = estimate_step(run_of("dpo", precompute_ref_log_probs=True), H100)
    assert before.seconds_per_micro_step < 0.85 * seconds["dpo"]


@pytest.mark.parametrize(
    "knobs",
    [
        {"compile": "regional"},
        {"activation_offloading": True},
        {"checkpointed_layers": 4},
        {"selective_checkpointing": True},
        {"num_processes": 2, "distributed": "fsdp"},
    ],
)
def test_what_nobody_has_seen_is_refused_by_name(knobs: dict[str, Any]) -> None:
    with pytest.raises(NotModelledError, match="task=dpo with " + list(knobs)[-1]):
        estimate_memory(run_of("dpo", **knobs), gpu=H100)


def test_what_contradicts_a_task_is_said_in_a_line() -> None:
    for knobs, said in (
        ({"packing": True}, "task dpo needs packing false"),
        ({"train_sampling_strategy": "group_by_length"}, "task dpo needs train_sampling_strategy random"),
    ):
        with pytest.raises(InputError, match=said):
            run_of("dpo", **knobs)
    with pytest.raises(InputError, match="precompute_ref_log_probs needs task dpo or kto"):
        run_of("reward", precompute_ref_log_probs=True)
    with pytest.raises(InputError, match="--data is read for task sft alone"):
        make_request(MODEL.id, knobs={"task": "dpo"}, data="pairs.jsonl")
    with pytest.raises(InputError, match="task dpo is planned and not trained from here"):
        refuse_task("dpo")


def test_a_plan_chooses_nothing_that_is_refused() -> None:
    request = make_request(MODEL.id, gpu="24GB", knobs={"task": "dpo", "max_length": 2048})
    plan = make_plan(request, whole=False)
    assert plan.fits
    assert plan.setup.task == "dpo"
    assert (plan.setup.compile, plan.setup.checkpointed_layers) == ("none", None)
    assert plan.schedule.learning_rate == 5e-6
