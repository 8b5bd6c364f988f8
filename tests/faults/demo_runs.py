"""Runs of the demo model, as a supervisor starts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.runs import supervisor
from launcher.runs.events import (
    EndEvent,
    read_events,
)
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import PROFILES
from planner.setup.training_setup import TrainingSetup

DEMO = PROFILES / "demo"


def make_run(root: Path, **changes: Any) -> RunFolder:
    # Processors without bfloat16 units take seventy times as long for it.
    setup = TrainingSetup(
        model="demo",
        max_length=128,
        per_device_train_batch_size=2,
        dtype="float32",
        gradient_checkpointing=False,
    )
    values: dict[str, Any] = {
        "setup": setup,
        "model_source": str(DEMO / "model"),
        "data_path": str(DEMO / "data" / "train.jsonl"),
        "learning_rate": 4e-3,
        **changes,
    }
    return create_run_folder(root, TrainingJob(**values))


def wait_until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.1)


def steps_seen(run: RunFolder) -> int:
    return supervisor.status(run.path).step


def the_end(run: RunFolder) -> EndEvent:
    ends = [event for event in read_events(run.events) if isinstance(event, EndEvent)]
    assert len(ends) == 1
    return ends[0]
