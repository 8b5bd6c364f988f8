"""`vramwise train` on the demo model: planned for this machine's GPU, trained on it, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.commands.demo import DEMO, SETTINGS
from launcher.runs.events import EndEvent, LogEvent, read_events
from launcher.runs.folder import RunFolder
from planner.answers.plan import Plan
from planner.calibration.records import RunRecord
from planner.setup.cuda_allocator import planned_allocator

pytestmark = pytest.mark.gpu

STEPS = 60


def test_the_demo_trains_within_the_memory_that_was_planned(tmp_path: Path) -> None:
    own = tmp_path / "own"
    child = subprocess.run(
        [
            *(sys.executable, "-m", "launcher.cli", "train", "--name=run", f"--runs={tmp_path}"),
            *(f"--model={DEMO / 'model'}", f"--data={DEMO / 'data' / 'train.jsonl'}"),
            *(f"--eval-data={DEMO / 'data' / 'eval.jsonl'}", *SETTINGS, f"--max-steps={STEPS}"),
        ],
        env={**os.environ, "VRAMWISE_DATA_DIR": str(own), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert f"Finished after {STEPS} steps" in child.stdout
    folder = RunFolder(tmp_path / "run")
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    plan = Plan.from_dict(json.loads(folder.plan.read_text(encoding="utf-8")))
    record = RunRecord.from_dict(json.loads(folder.record.read_text(encoding="utf-8")))
    assert (record.outcome, record.setup) == ("ok", plan.setup)
    assert record.allocator == planned_allocator()
    assert len((own / "runs" / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert record.predicted is not None
    assert {"load", "step", "evaluation"} <= {phase.name for phase in record.phases}
    for phase in record.phases:
        assert phase.process_bytes is not None
        assert phase.allocated_bytes <= phase.reserved_bytes <= phase.process_bytes
        assert phase.process_bytes <= record.predicted.process_upper_bytes
    events = read_events(folder.events)
    assert [event.state for event in events if isinstance(event, EndEvent)] == ["finished"]
    losses = [event.loss for event in events if isinstance(event, LogEvent) and event.loss is not None]
    assert losses[-1] < 0.8 * losses[0]
