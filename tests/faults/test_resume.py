"""Checkpoints and resumption: real trainers of the demo model, forked, compared bit by bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import checkpoints
from launcher.runs.ends import RunExit
from launcher.runs.events import AttemptEvent, CheckpointEvent, EndEvent, EvalEvent, LogEvent, StartEvent
from launcher.runs.folder import RunFolder
from planner.base.data_files import PROFILES
from tests.faults import broken_steps
from tests.faults.small_runs import (
    SETUP,
    differences,
    events_of,
    go_on,
    make_run,
    trained,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DROPOUT = SETUP.replace(lora_dropout=0.1)
EVAL_DATA = str(PROFILES / "demo" / "data" / "eval.jsonl")
EXAMPLES = 5
"""Three steps an epoch of two examples, the last with one."""

KINDS: dict[str, dict[str, Any]] = {
    "dropout, evaluated at each epoch's end": {"setup": DROPOUT, "eval_data_path": EVAL_DATA},
    "packed, evaluated every other step": {
        "setup": DROPOUT.replace(packing=True, attn_implementation="sdpa"),
        "eval_data_path": EVAL_DATA,
        "eval_steps": 2,
        "examples": 12,
    },
    "bfloat16 in 8-bit state, accumulated": {
        "setup": DROPOUT.replace(
            dtype="bfloat16", optim="adamw_8bit", per_device_train_batch_size=1, gradient_accumulation_steps=2
        )
    },
    "all weights": {"setup": SETUP.replace(method="full", lora_r=16), "learning_rate": 1e-4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(tmp_path: Path, kind: str) -> None:
    """Killed in the midst of the second epoch and at the end of the first, after saves at every step."""
    values = {"examples": EXAMPLES, "save_steps": 1, "keep_checkpoints": 100, **KINDS[kind]}
    whole = make_run(tmp_path, name="whole", **values)
    assert trained(whole) == RunExit.FINISHED
    all_steps = checkpoints.steps(whole.checkpoints)
    last = all_steps[-1]
    per_epoch = last // 2
    cut = make_run(tmp_path, name="cut", **values)
    assert trained(cut, functools.partial(broken_steps.dies_after, per_epoch)) == -9
    assert checkpoints.newest(cut.checkpoints).newest is not None
    go_on(cut)
    assert trained(cut, functools.partial(broken_steps.dies_after, per_epoch + 1)) == -9
    assert go_on(cut).from_step == per_epoch + 1
    assert trained(cut) == RunExit.FINISHED
    for step in all_steps:
        pair = [checkpoints.path_of(run.checkpoints, step) for run in (whole, cut)]
        assert differences(*pair) == [], step
    assert differences(whole.adapter, cut.adapter) == []
    losses = [{(e.step, e.loss, e.num_tokens) for e in events_of(run, LogEvent)} for run in (whole, cut)]
    assert losses[0] == losses[1]
    evaluated = [{(e.step, e.loss) for e in events_of(run, EvalEvent)} for run in (whole, cut)]
    assert evaluated[0] == evaluated[1]
    assert [event.first_step for event in events_of(cut, StartEvent)] == [0, per_epoch, per_epoch + 1]
    assert [event.number for event in events_of(cut, AttemptEvent)] == [1, 2, 3]
