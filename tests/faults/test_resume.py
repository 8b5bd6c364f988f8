"""Checkpoints and resumption: real trainers of the demo model, forked, compared bit by bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills import SAVE_STEPS, Tally, kill_runs
from launcher import cli
from launcher.runs import supervisor
from launcher.runs.attempts import as_trained
from launcher.runs.ends import RunExit
from launcher.runs.events import (
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    LogEvent,
    StartEvent,
    read_events,
)
from launcher.runs.kept import checkpoints
from planner.base.data_files import PROFILES
from planner.commands.program import guarded
from tests.faults import broken_steps
from tests.faults.broken_steps import BROKEN_AFTER
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
EVALUATED = 3
"""Examples that are evaluated on: a batch and a half."""
EXAMPLES = 5
"""Three steps an epoch of two examples, the last with one."""

KINDS: dict[str, dict[str, Any]] = {
    "dropout, evaluated at each epoch's end": {"setup": DROPOUT, "evaluates": True},
    "packed, evaluated every other step": {
        "setup": DROPOUT.replace(packing=True, attn_implementation="sdpa"),
        "evaluates": True,
        "eval_steps": 2,
        "examples": 12,
    },
    "qlora in bfloat16 and 8-bit state, accumulated": {
        "setup": DROPOUT.replace(
            method="qlora",
            dtype="bfloat16",
            optim="adamw_8bit",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
        )
    },
    "all weights": {"setup": SETUP.replace(method="full", lora_r=16), "learning_rate": 1e-4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(tmp_path: Path, kind: str) -> None:
    """Killed in the midst of the second epoch and at the end of the first, after saves at every step."""
    values = {"examples": EXAMPLES, "save_steps": 1, "keep_checkpoints": 100, **KINDS[kind]}
    if values.pop("evaluates", False):
        lines = (PROFILES / "demo" / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "eval.jsonl").write_text("".join(lines[:EVALUATED]))
        values["eval_data_path"] = str(tmp_path / "eval.jsonl")
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


def test_half_the_micro_batch_goes_on_with_the_same_examples_a_step(tmp_path: Path) -> None:
    values = {"examples": 7, "save_steps": 2, "setup": SETUP.replace(per_device_train_batch_size=4)}
    whole, cut = (make_run(tmp_path, name=name, **values) for name in ("whole", "cut"))
    assert trained(whole) == RunExit.FINISHED
    assert trained(cut, functools.partial(broken_steps.dies_after, 3)) == -9
    halved = SETUP.replace(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    attempt = go_on(cut, setup=halved, reason="oom", changes="micro-batch 4 before, 2 now")
    assert attempt.from_step == 2
    assert trained(cut) == RunExit.FINISHED
    (told,) = (event for event in events_of(cut, AttemptEvent) if event.number == 2)
    assert (told.reason, told.from_step, told.changes) == ("oom", 2, attempt.changes)
    one, other = (as_trained(read_events(run.events)) for run in (whole, cut))
    logs = [[event for event in events if isinstance(event, LogEvent)] for events in (one, other)]
    assert [event.step for event in logs[1]] == [1, 2, 3, 4]
    for mine, its in zip(*logs, strict=True):
        assert mine.num_tokens == its.num_tokens
        assert mine.loss == pytest.approx(its.loss, rel=1e-4)


def test_more_epochs_train_on_and_fewer_steps_end_with_what_the_checkpoint_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=EXAMPLES, save_steps=1)
    assert trained(run, functools.partial(broken_steps.dies_after, 4)) == -9
    at_four = load(checkpoints.path_of(run.checkpoints, 4))
    go_on(run, max_steps=4)
    assert trained(run) == RunExit.FINISHED
    assert events_of(run, EndEvent)[-1].step == 4
    assert load(run.adapter) == at_four
    go_on(run, num_train_epochs=3.0, max_steps=None)
    assert trained(run) == RunExit.FINISHED
    assert events_of(run, EndEvent)[-1].step == 9
    assert load(run.adapter) != at_four
    seen = [event.step for event in as_trained(read_events(run.events)) if isinstance(event, LogEvent)]
    assert seen == list(range(1, 10))
    status = supervisor.status(run.path)
    assert (status.state, status.step, status.total_steps) == ("finished", 9, 9)


def load(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def test_what_was_good_before_a_diverging_step_is_kept(tmp_path: Path) -> None:
    """The weights are saved though no save was due, with the random states from before the step."""
    values = {"examples": EXAMPLES, "setup": DROPOUT}
    good = make_run(tmp_path, name="good", save_steps=BROKEN_AFTER, keep_checkpoints=9, **values)
    assert trained(good) == RunExit.FINISHED
    bad = make_run(tmp_path, name="bad", **values, save_steps=1000)
    assert trained(bad, broken_steps.loses_a_gradient) == RunExit.DIVERGED
    assert checkpoints.steps(bad.checkpoints) == [BROKEN_AFTER]
    pair = [checkpoints.path_of(run.checkpoints, BROKEN_AFTER) for run in (good, bad)]
    assert differences(*pair) == []
    assert not bad.adapter.exists()


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=EXAMPLES, save_steps=1000)
    assert trained(run, broken_steps.loses_a_weight) == RunExit.DIVERGED
    assert checkpoints.steps(run.checkpoints) == []
    assert not run.adapter.exists()


def test_a_run_of_an_hour_saves_at_each_epochs_end_and_when_asked_to_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=EXAMPLES)
    assert trained(run, functools.partial(broken_steps.does_after, 4, run.stop.touch)) == 130
    assert [event.step for event in events_of(run, CheckpointEvent)] == [3, 5]
    kept = checkpoints.newest(run.checkpoints).newest
    assert kept is not None
    assert not [path for path in run.path.rglob("*") if path.suffix in (".bin", ".pkl")]


def test_without_checkpoints_none_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=2, checkpoints=False, max_steps=1)
    assert trained(run) == RunExit.FINISHED
    assert not run.checkpoints.exists() or not list(run.checkpoints.iterdir())
    assert run.adapter.is_dir()


def test_twenty_random_kills_lose_nothing_that_was_saved(tmp_path: Path) -> None:
    tally = Tally(seed=1, launcher_sha256="")
    told: list[int] = []
    kill_runs(tmp_path, 20, tally, lambda so_far: told.append(so_far.runs_finished))
    assert tally.trainers_killed >= 20
    assert tally.partial_folders_named_as_checkpoints == []
    assert tally.checkpoints_told_and_not_there == 0
    assert tally.different == []
    assert tally.bit_identical_to_the_uninterrupted_run == tally.runs_finished == len(told) > 0
    assert max(map(int, tally.steps_done_again)) <= SAVE_STEPS


def test_the_command_goes_on_with_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person does in the morning: the newest checkpoint is broken, and of the stop file of a run that
    was stopped before nothing is left.
    """
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    whole = make_run(tmp_path, name="whole", examples=EXAMPLES, save_steps=1)
    assert trained(whole) == RunExit.FINISHED
    run = make_run(tmp_path, examples=EXAMPLES, save_steps=1, keep_checkpoints=3)
    assert trained(run, functools.partial(broken_steps.dies_after, 4)) == -9
    run.stop.touch()
    (run.checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    assert guarded("vramwise", lambda: cli.run(["runs", "resume", "run", "--runs", str(tmp_path)])) == 0
    said = capsys.readouterr()
    assert "checkpoint-4/optimizer.pt" in said.err
    assert "goes on after step 3" in said.err
    assert "Finished after 6 steps" in said.out
    assert differences(whole.adapter, run.adapter) == []
    assert checkpoints.newest(run.checkpoints).broken == ()
    assert guarded("vramwise", lambda: cli.run(["runs", "resume", "run", "--runs", str(tmp_path)])) == 2
    assert "is finished" in capsys.readouterr().err
