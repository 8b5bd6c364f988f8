"""Memory that runs out amid a run: the next setup down goes on, with the effective batch kept."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from launcher.models.inspect import inspect_config
from launcher.runs import keeper
from launcher.runs.attempts import add_attempt, as_trained, first_attempt, read_attempts
from launcher.runs.ends import RunExit
from launcher.runs.events import AttemptEvent, CheckpointEvent, EndEvent, LogEvent, read_events
from launcher.runs.folder import RunFolder
from launcher.runs.job import JobWish, create_planned_run
from launcher.runs.minding import smaller
from launcher.runs.record import read_plan
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest
from tests.faults import broken_steps, small_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LARGEST = 4
"""Examples a micro-step that there is room for, in these tests."""


@functools.cache
def demo() -> ModelSpec:
    """The model, described in this process: the keeper's asks for one that describes it."""
    return resolve_model(str(small_runs.DEMO / "model"), inspector=inspect_config)


def planned_run(root: Path) -> RunFolder:
    made = small_runs.make_run(root)
    job = made.read_job()
    knobs = {
        "max_length": 64,
        "method": "lora",
        "dtype": "float32",
        "lora_r": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "compile": "none",
        "activation_offloading": False,
        "optim": "adamw_torch_fused",
    }
    request = PlanRequest(model=job.model_source, gpu="16GB", knobs=tuple(knobs.items()))
    plan = make_plan(request, model=demo(), whole=False)
    wish = JobWish(model_source=job.model_source, data=Path(job.data_path), max_steps=5)
    return create_planned_run(root, plan, wish, name="planned")


def goes_down(run: RunFolder) -> bool:
    """Make the attempt that the keeper makes; whether there is one."""
    end = small_runs.events_of(run, EndEvent)[-1]
    found = keeper.next_attempt(run, keeper.AttemptEnd(state=end.state, message=end.message, step=end.step))
    if found is not None:
        add_attempt(run.attempts, found)
    return found is not None


def test_a_run_that_is_too_large_goes_on_smaller_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    add_attempt(run.attempts, first_attempt(run.read_job()))
    too_large = functools.partial(broken_steps.runs_out_beyond, LARGEST)
    assert small_runs.trained(run, too_large) == RunExit.OOM
    assert small_runs.events_of(run, EndEvent)[-1].state == "oom"
    kept = small_runs.events_of(run, CheckpointEvent)[-1].step
    assert goes_down(run)
    assert small_runs.trained(run, too_large) == RunExit.FINISHED
    first, second = read_attempts(run.attempts)
    assert (second.reason, second.from_step) == ("oom", kept)
    assert second.setup.per_device_train_batch_size <= LARGEST
    assert second.setup.effective_batch_size == first.setup.effective_batch_size == 8
    told = small_runs.events_of(run, AttemptEvent)[-1]
    assert f"per_device_train_batch_size 8 -> {second.setup.per_device_train_batch_size}" in told.changes
    logs = [event for event in as_trained(read_events(run.events)) if isinstance(event, LogEvent)]
    assert [log.step for log in logs] == [1, 2, 3, 4, 5]
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_it_is_made_smaller_at_most_twice(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    attempt = first_attempt(run.read_job())
    for number, reason in enumerate(("start", "oom", "oom"), start=1):
        add_attempt(run.attempts, dataclasses.replace(attempt, number=number, reason=reason))
    assert keeper.next_attempt(run, keeper.AttemptEnd(state="oom", message="", step=0)) is None


def test_a_host_out_of_memory_is_no_reason_for_the_same_again(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    add_attempt(run.attempts, first_attempt(run.read_job()))
    end = keeper.AttemptEnd(state="oom", message="", step=0, host_memory=True)
    assert keeper.next_attempt(run, end) is None


def test_a_model_whose_name_is_a_folder_is_described_from_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its name, and described by nothing there: a plan does not say what describes."""
    run = planned_run(tmp_path)
    plan = read_plan(run)
    assert plan is not None
    monkeypatch.chdir(small_runs.DEMO)
    assert Path(plan.model.id).is_dir()
    monkeypatch.setattr("planner.models.inspectors.installed_inspector", inspect_config)
    assert smaller.model_of(run, plan).id == demo().id


def test_what_others_leave_of_the_card_counts_as_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned_run(tmp_path)
    add_attempt(run.attempts, first_attempt(run.read_job()))
    monkeypatch.setattr(smaller, "model_of", lambda folder, plan: demo())
    assert smaller.smaller_attempt(run, from_step=0, room_bytes=None) is not None
    assert smaller.smaller_attempt(run, from_step=0, room_bytes=40 * 2**30) is not None
    assert smaller.smaller_attempt(run, from_step=0, room_bytes=2**29) is None
