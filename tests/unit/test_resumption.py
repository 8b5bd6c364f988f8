"""Whether a run that has ended may go on, and from where."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import stack, supervisor
from launcher.runs.attempts import add_attempt, as_trained, first_attempt, read_attempts
from launcher.runs.events import (
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    EventWriter,
    LogEvent,
    StartEvent,
)
from launcher.runs.folder import RunBusyError, RunFolder, create_run_folder, hold_lock
from launcher.runs.kept import checkpoints, fingerprint
from launcher.runs.kept.resumption import ResumeWish, prepare, shared_by
from launcher.runs.training_job import TrainingJob
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup


def log(step: int, loss: float = 1.0) -> LogEvent:
    return LogEvent(
        time=1.0,
        step=step,
        loss=loss,
        learning_rate=None,
        grad_norm=None,
        tokens_per_second=None,
        step_seconds=None,
    )


def attempt_event(number: int, from_step: int) -> AttemptEvent:
    return AttemptEvent(time=1.0, number=number, reason="resume", from_step=from_step)


def save(run: RunFolder, step: int) -> Path:
    staged = checkpoints.stage(run.checkpoints, step)
    (staged / "adapter_model.safetensors").write_bytes(b"w" * step)
    return checkpoints.publish(staged, run.checkpoints).path


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Killed after step 7 of 9; checkpoints of steps 3 and 6."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "readme.md").write_text("")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "eval.jsonl").write_text('{"text": "b"}\n')
    job = TrainingJob(
        setup=TrainingSetup(model="m", max_length=64),
        model_source=str(model),
        data_path=str(tmp_path / "train.jsonl"),
        eval_data_path=str(tmp_path / "eval.jsonl"),
    )
    folder = create_run_folder(tmp_path / "runs", job, name="run")
    add_attempt(folder.attempts, first_attempt(job))
    fingerprint.write(folder, fingerprint.take(job))
    with EventWriter(folder.events) as writer:
        writer.write(AttemptEvent(time=1.0, number=1, reason="start", from_step=0))
        writer.write(StartEvent(time=1.0, total_steps=9, environment={}))
        for step in range(1, 8):
            writer.write(log(step))
    save(folder, 3)
    save(folder, 6)
    return folder


def test_a_killed_run_goes_on_from_its_newest_checkpoint(run: RunFolder) -> None:
    found = prepare(run, ResumeWish())
    assert (found.attempt.number, found.attempt.reason, found.attempt.from_step) == (2, "resume", 6)
    assert found.attempt.setup == run.read_job().setup
    assert (found.attempt.changes, found.broken) == ("", ())


def test_of_a_broken_checkpoint_it_is_said_and_the_one_before_is_taken(run: RunFolder) -> None:
    weights = run.checkpoints / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(b"v" * 6)
    found = prepare(run, ResumeWish())
    assert found.attempt.from_step == 3
    (reason,) = found.broken
    assert str(weights) in reason


def test_without_a_checkpoint_it_begins_anew(run: RunFolder) -> None:
    for step in (3, 6):
        (run.checkpoints / f"checkpoint-{step}" / checkpoints.MANIFEST).unlink()
    found = prepare(run, ResumeWish())
    assert found.attempt.from_step == 0
    assert len(found.broken) == 2


CHANGES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "data": ("data", "training data has changed", lambda root: (root / "train.jsonl").write_text("{}\n")),
    "evaluation data": (
        "data",
        "evaluation data is gone",
        lambda root: (root / "eval.jsonl").unlink(),
    ),
    "weights": (
        "model",
        "model.safetensors has changed",
        lambda root: (root / "model" / "model.safetensors").write_bytes(b"weightz"),
    ),
    "tokenizer": (
        "model",
        "tokenizer.json is new",
        lambda root: (root / "model" / "tokenizer.json").write_text("{}"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named_and_refused_unless_accepted(
    run: RunFolder, tmp_path: Path, change: str
) -> None:
    kind, text, make = CHANGES[change]
    make(tmp_path)
    other = next(one for one in fingerprint.KINDS if one != kind)
    for accepted in ((), (other,)):
        with pytest.raises(InputError, match=text) as caught:
            prepare(run, ResumeWish(accepted=accepted))
        assert f"--accept-changes {kind}" in str(caught.value)
        assert "\n" not in str(caught.value)
    found = prepare(run, ResumeWish(accepted=(kind,)))
    assert text in found.attempt.changes
    # What was accepted once is not asked for again.
    fingerprint.write(run, found.fingerprint)
    assert prepare(run, ResumeWish()).attempt.changes == ""


def test_other_versions_are_named_and_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "versions", lambda: (("torch", "1.0"),))
    with pytest.raises(InputError, match=r"torch .* before, 1\.0 now"):
        prepare(run, ResumeWish())
    assert "torch" in prepare(run, ResumeWish(accepted=("versions",))).attempt.changes


@pytest.mark.parametrize("values", [{"learning_rate": 0.5}, {"seed": 7}, {"save_steps": 3}])
def test_an_edited_job_is_refused_and_says_what_a_resumption_can_change(
    run: RunFolder, values: dict[str, Any]
) -> None:
    run.job.write_text(json.dumps(dataclasses.replace(run.read_job(), **values).to_dict()))
    with pytest.raises(InputError, match=next(iter(values))) as caught:
        prepare(run, ResumeWish(accepted=fingerprint.KINDS))
    assert "--epochs and --max-steps" in str(caught.value)


def test_data_and_model_may_lie_elsewhere(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    job = dataclasses.replace(run.read_job(), data_path=str(tmp_path / "moved.jsonl"))
    run.job.write_text(json.dumps(job.to_dict()))
    assert prepare(run, ResumeWish()).attempt.from_step == 6


def test_a_run_without_a_fingerprint_is_refused_unless_all_is_accepted(run: RunFolder) -> None:
    run.fingerprint.unlink()
    with pytest.raises(InputError, match=r"--accept-changes data,model,versions"):
        prepare(run, ResumeWish())
    assert prepare(run, ResumeWish(accepted=fingerprint.KINDS)).attempt.from_step == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"data": 1}'])
def test_a_broken_fingerprint_is_refused_in_one_line(run: RunFolder, content: str) -> None:
    run.fingerprint.write_text(content)
    with pytest.raises(InputError, match=r"fingerprint|data|Fingerprint") as caught:
        prepare(run, ResumeWish())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wish", "epochs", "steps", "changes"),
    [
        (ResumeWish(num_train_epochs=5.0), 5.0, None, "epochs 3 before, 5 now"),
        (ResumeWish(max_steps=8), 3.0, 8, "max steps none before, 8 now"),
    ],
)
def test_epochs_and_steps_can_be_others(
    run: RunFolder, wish: ResumeWish, epochs: float, steps: int | None, changes: str
) -> None:
    attempt = prepare(run, wish).attempt
    assert (attempt.num_train_epochs, attempt.max_steps, attempt.changes) == (epochs, steps, changes)
    assert attempt.apply(run.read_job()).num_train_epochs == epochs


def test_epochs_take_the_place_of_steps(run: RunFolder) -> None:
    add_attempt(run.attempts, prepare(run, ResumeWish(max_steps=8)).attempt)
    attempt = prepare(run, ResumeWish(num_train_epochs=4.0)).attempt
    assert (attempt.number, attempt.num_train_epochs, attempt.max_steps) == (3, 4.0, None)


@pytest.mark.parametrize("wish", [ResumeWish(max_steps=5), ResumeWish(num_train_epochs=1.0)])
def test_fewer_steps_than_the_checkpoint_holds_are_refused(run: RunFolder, wish: ResumeWish) -> None:
    with pytest.raises(InputError, match="checkpoint holds 6"):
        prepare(run, wish)


def test_what_runs_or_is_finished_or_never_was_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with hold_lock(run, "trainer"), pytest.raises(RunBusyError, match="running"):
        prepare(run, ResumeWish())
    with EventWriter(run.events) as writer:
        writer.write(EndEvent(time=2.0, state="finished", message="", step=9))
    with pytest.raises(InputError, match="is finished"):
        prepare(run, ResumeWish())
    fresh = create_run_folder(tmp_path / "runs", run.read_job(), name="fresh")
    with pytest.raises(InputError, match="has not been started"):
        prepare(fresh, ResumeWish())


def test_only_known_kinds_can_be_accepted() -> None:
    with pytest.raises(InputError, match="job"):
        ResumeWish(accepted=("job",))


def test_a_second_resumption_begun_meanwhile_is_refused(run: RunFolder) -> None:
    found = prepare(run, ResumeWish())
    add_attempt(run.attempts, found.attempt)
    with pytest.raises(RunBusyError):
        supervisor.resume(run.path, found.attempt)
    assert [one.number for one in read_attempts(run.attempts)] == [1, 2]


def test_what_is_done_again_is_told_once() -> None:
    def evaluated(step: int) -> EvalEvent:
        return EvalEvent(time=1.0, step=step, loss=float(step))

    end = EndEvent(time=1.0, state="oom", message="", step=3)
    events: list[Event] = [
        attempt_event(1, 0),
        log(1, 3.0),
        log(2, 2.0),
        evaluated(2),
        CheckpointEvent(time=1.0, step=2, path="p"),
        log(3, 9.0),
        evaluated(3),
        end,
        attempt_event(2, 2),
        log(3, 1.5),
        evaluated(3),
    ]
    found = as_trained(events)
    assert [event.loss for event in found if isinstance(event, LogEvent)] == [3.0, 2.0, 1.5]
    assert [event.step for event in found if isinstance(event, EvalEvent)] == [2, 3]
    assert not [event for event in found if isinstance(event, EndEvent)]
    assert as_trained([*events, end])[-1] == end


def test_a_large_file_is_marked_by_size_header_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 10)
    path = tmp_path / "model.safetensors"
    content = bytearray((100).to_bytes(8, "little") + bytes(range(100)) + bytes(20_000))
    marks = set()
    for change in (None, 50, len(content) - 1, "longer"):
        changed = bytearray(content)
        if isinstance(change, int):
            changed[change] ^= 255
        path.write_bytes(changed + (b"x" if change == "longer" else b""))
        marks.add(fingerprint._mark(path, "m"))
    assert len(marks) == 4


SHARED = TrainingSetup(model="m", max_length=64, gradient_accumulation_steps=8)


def test_on_more_processes_it_goes_on_with_the_same_batch_and_on_the_first_gpus(run: RunFolder) -> None:
    setup = shared_by(SHARED, 4, None)
    assert (setup.num_processes, setup.distributed, setup.gradient_accumulation_steps) == (4, "ddp", 2)
    job = dataclasses.replace(run.read_job(), setup=SHARED, gpu_index=1)
    attempt = first_attempt(job)
    assert attempt.apply(job).gpu_index == 1
    assert dataclasses.replace(attempt, setup=setup).apply(job).gpu_index == 0


@pytest.mark.parametrize(
    ("processes", "knobs", "said"),
    [
        (3, {}, "an effective batch of 8 cannot be shared"),
        (2, {"train_sampling_strategy": "group_by_length"}, "grouped by length"),
    ],
)
def test_a_number_of_processes_that_would_train_otherwise_is_refused(
    processes: int, knobs: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        shared_by(SHARED.replace(**knobs), processes, None)


def test_no_processes_are_refused() -> None:
    with pytest.raises(InputError, match="--num-processes"):
        ResumeWish(num_processes=0)
