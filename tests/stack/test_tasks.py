"""Tasks beside supervised fine-tuning: what steps of TRL's own trainers hold, beside what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from planner.memory.estimate import live_memory
from planner.memory.measured.files import coefficients_for
from planner.memory.step.replay import replay_steps
from planner.memory.step.resident import INPUT_BYTES_PER_TOKEN
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL
from planner.setup.training_setup import TrainingSetup

from .small_models import spec_of
from .task_steps import TILE, gpu_head, step_of

pytestmark = pytest.mark.slow

TOLERANCE = 0.002
KEPT = {"gradient_checkpointing": False}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dpo", "llama", {"method": "qlora"}),
    ("dpo", "qwen3", {"method": "qlora", "precompute_ref_log_probs": True, "lora_dropout": 0.05}),
    # Nothing is recomputed, so that the reference's pass comes on top of the most.
    ("dpo", "llama", {"method": "lora", **KEPT}),
    ("dpo", "llama", {"method": "full"}),
    ("kto", "llama", {"method": "qlora"}),
    ("kto", "llama", {"method": "lora", **KEPT}),
    ("reward", "llama", {"method": "qlora"}),
    ("reward", "qwen3", {"method": "lora", **KEPT}),
    ("reward", "llama", {"method": "full"}),
]


def counted(task: str, family: str, knobs: dict[str, Any]) -> TrainingRun:
    setup = TrainingSetup(
        model=family, max_length=256, per_device_train_batch_size=2, task=task, optim="adamw_torch", **knobs
    )
    return TrainingRun(setup=setup, model=spec_of(family), stack=replace(TRL, head_vocabulary=TILE))


@pytest.mark.parametrize(("task", "family", "knobs"), CASES)
def test_a_step_holds_what_is_counted(task: str, family: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    run = counted(task, family, knobs)
    with gpu_head():
        measured = step_of(family, run.setup, tmp_path)
        memory = live_memory(
            run, gpu=None, coefficients=coefficients_for(None, EXPANDABLE), allocator=EXPANDABLE
        )
        replayed = replay_steps(run, gpu=None, allocator=EXPANDABLE)
    resident = memory.resident
    inputs = INPUT_BYTES_PER_TOKEN * run.micro_step.tokens
    # The batch is there before the step; the rest of the tables is made in it.
    step = memory.peak.total_bytes + resident.tables_bytes - inputs
    assert measured.peak_bytes == pytest.approx(step, rel=TOLERANCE), measured.peak_operation
    assert measured.keeps_nothing == memory.peak.name.startswith("reference")
    # What torch's allocator hands out for a whole training is the same, told request by request.
    whole = resident.allocated_bytes + memory.peak.total_bytes
    assert replayed.step_allocated_bytes == pytest.approx(whole, rel=TOLERANCE)
