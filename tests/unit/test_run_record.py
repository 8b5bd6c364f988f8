"""What a run's events become: predicted beside measured, and a record where it ran on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.events import EndEvent, Event, LogEvent, MemoryEvent, StartEvent, to_line
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.record import make_record, store_record
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import user_data_dir, write_atomically
from planner.calibration.records import read_records
from planner.planning.make_plan import make_plan
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE
from planner.setup.request import make_request

Cli = Callable[..., Any]
GIB = 2**30
ON_GPU: dict[str, str | int | float | None] = {
    "python": "3.12.1",
    "torch": "2.13.0",
    "trl": "1.16.0",
    "device": "NVIDIA H100 80GB HBM3",
    "cuda": "13.0",
    "cpu_threads": 8,
    "compute_capability": "9.0",
    "gpu_total_bytes": 85_017_493_504,
    "context_bytes": 550_000_000,
    "weights_bytes": 400_000_000,
}
ON_CPU: dict[str, str | int | float | None] = {"python": "3.12.1", "torch": "2.13.0", "device": "cpu"}


def run_with(root: Path, environment: dict[str, Any], *, on_gpu: bool) -> RunFolder:
    plan = make_plan(make_request("qwen2.5-0.5b", gpu="h100"), whole=False)
    job = TrainingJob(setup=plan.setup, model_source="Qwen/Qwen2.5-0.5B", data_path="data.jsonl")
    folder = create_run_folder(root, job, name="run")
    write_atomically(folder.plan, json.dumps(plan.to_dict()))
    events: list[Event] = [StartEvent(time=1.8e9, total_steps=4, environment=environment)]
    for step in (1, 2, 3, 4):
        seconds = 5.0 if step == 1 else 1.0
        events.append(
            LogEvent(
                time=1.8e9 + step,
                step=step,
                loss=3.0 - step / 10,
                learning_rate=1e-4,
                grad_norm=1.0,
                tokens_per_second=4000 / seconds + step,
                step_seconds=seconds,
            )
        )
        events.append(memory("step", step, step * GIB, on_gpu))
    events += [memory("load", 0, GIB // 2, on_gpu), memory("save", 4, 4 * GIB, on_gpu)]
    events.append(EndEvent(time=1.8e9 + 9, state="finished", message="", step=4))
    folder.events.write_text("".join(map(to_line, events)))
    return folder


def memory(phase: str, step: int, size: int, on_gpu: bool) -> MemoryEvent:
    return MemoryEvent(
        time=1.8e9,
        phase=phase,
        step=step,
        allocated_bytes=size if on_gpu else None,
        reserved_bytes=size + GIB if on_gpu else None,
        process_bytes=size + 2 * GIB,
    )


def test_a_run_on_a_gpu_becomes_a_record(tmp_path: Path) -> None:
    record = make_record(run_with(tmp_path, ON_GPU, on_gpu=True), "ok")
    assert record is not None
    assert record.source == "train"
    assert record.first_step_seconds == 1.0
    assert record.environment.gpu_id == "h100-80gb"
    assert record.environment.compute_capability == (9, 0)
    assert dict(record.environment.versions) == {"torch": "2.13.0", "trl": "1.16.0"}
    step = record.phase("step")
    assert step is not None
    assert (step.allocated_bytes, step.process_bytes) == (4 * GIB, 6 * GIB)
    assert record.weights_bytes == 400_000_000
    assert record.tokens_per_second == pytest.approx(4003.5)
    assert record.predicted is not None
    assert record.predicted.allocated_bytes > 0
    assert record.step_seconds == (5.0, 1.0, 1.0, 1.0)


def test_a_record_says_which_allocator_its_run_had(tmp_path: Path) -> None:
    """What the trainer noted; a run of before it did had torch's default."""
    facts = {NATIVE: ON_GPU, EXPANDABLE: {**ON_GPU, "allocator": EXPANDABLE}}
    for allocator, environment in facts.items():
        record = make_record(run_with(tmp_path / allocator, environment, on_gpu=True), "ok")
        assert record is not None
        assert record.allocator == allocator
        assert dict(record.environment.versions) == {"torch": "2.13.0", "trl": "1.16.0"}


def test_a_record_is_stored_in_the_run_and_among_the_persons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    record = store_record(folder, "ok")
    assert record is not None
    assert json.loads(folder.record.read_text())["id"] == record.id
    assert list(read_records(user_data_dir() / "runs" / "train.jsonl")) == [record]


def test_a_run_on_the_cpu_is_no_record_of_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    folder = run_with(tmp_path, ON_CPU, on_gpu=False)
    assert store_record(folder, "ok") is None
    assert not folder.record.exists()
    assert not user_data_dir().exists()


@pytest.mark.parametrize(("on_gpu", "facts"), [(True, ON_GPU), (False, ON_CPU)])
def test_predicted_is_shown_beside_measured(
    cli: Cli, tmp_path: Path, on_gpu: bool, facts: dict[str, Any]
) -> None:
    pytest.importorskip("psutil")
    folder = run_with(tmp_path, facts, on_gpu=on_gpu)
    folder.lock_file("trainer").touch()
    finished = cli("runs", "follow", "run", "--runs", tmp_path)
    assert finished.code == 0
    assert "Predicted beside measured" in finished.out
    assert "Finished after 4 steps" in finished.out
    assert ("%" in finished.out) == on_gpu
    assert ("cannot agree" in finished.out) != on_gpu
    assert "6.00" in finished.out


def test_runs_are_listed(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    run_with(tmp_path, ON_CPU, on_gpu=False)
    listed = json.loads(cli("runs", "--runs", tmp_path, "--json").out)
    (row,) = listed["runs"]
    assert (row["run"], row["state"], row["step"], row["total_steps"]) == ("run", "finished", 4, 4)
    assert (row["alive"], row["damaged"], row["model"]) == (False, [], "qwen2.5-0.5b")
    assert "finished" in cli("runs", "--runs", tmp_path).out
    assert cli("runs", "--runs", tmp_path / "none").code == 0
