"""The run's processes under faults: real processes on the demo model, on the CPU.

What the launcher starts is started by it once to its end (test_demo_run.py), once to be stopped
(test_cli_train.py) and once to be killed while it loads; what the training process does by itself is seen in
forks (tests/forks.py).
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from launcher.runs import supervisor
from launcher.runs.ends import RunExit
from launcher.runs.events import (
    EvalEvent,
    read_events,
)
from launcher.runs.folder import RunFolder
from launcher.runs.heartbeat import STACKS_SIGNAL, read_beat
from launcher.runs.kept import checkpoints
from planner.setup.training_setup import TrainingSetup
from tests import forks
from tests.faults import broken_steps
from tests.faults.broken_steps import BROKEN_AFTER
from tests.faults.demo_runs import DEMO, make_run, steps_seen, the_end, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = 100_000
SMALL = TrainingSetup(
    model="demo", max_length=64, method="lora", dtype="float32", per_device_train_batch_size=2, lora_r=4
)


def start(run: RunFolder, break_step: Callable[[], None] | None = None) -> BaseProcess:
    """Start the training process as it is, or with a step that fails."""
    return forks.start(broken_steps.train, run.path, break_step, output=run.log("trainer"))


def exit_code(trainer: BaseProcess) -> int | None:
    trainer.join(600)
    return trainer.exitcode


def test_a_stop_file_ends_the_run_after_the_step_with_the_adapter_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG, save_steps=LONG)
    trainer = start(run)
    wait_until(lambda: steps_seen(run) >= 2)
    supervisor.request_stop(run.path)
    assert exit_code(trainer) == RunExit.STOPPED_SAVED
    status = supervisor.status(run.path)
    assert status.state == "stopped"
    assert (run.adapter / "adapter_model.safetensors").exists()
    checkpoint = run.checkpoints / f"checkpoint-{status.step}"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "training_args.bin").exists()


@pytest.mark.parametrize("warning", [signal.SIGTERM, signal.SIGUSR1])
def test_hangup_is_ignored_and_a_warning_saves(tmp_path: Path, warning: signal.Signals) -> None:
    run = make_run(tmp_path, setup=SMALL, max_steps=LONG)
    trainer = start(run)
    wait_until(lambda: steps_seen(run) >= 1)
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGHUP)
    step = steps_seen(run)
    wait_until(lambda: steps_seen(run) > step + 2)
    os.kill(trainer.pid, STACKS_SIGNAL)
    # Wherever in a step it is then.
    wait_until(lambda: "in _inner_training_loop" in run.log("trainer").read_text())
    beat = read_beat(run.heartbeat)
    assert beat is not None
    assert (beat.stage, beat.step > step) == ("training", True)
    os.kill(trainer.pid, warning)
    assert exit_code(trainer) == RunExit.STOPPED_SAVED
    assert supervisor.status(run.path).state == "stopped"
    assert run.adapter.exists()


def test_a_stop_ends_a_long_evaluation_without_one_more_step(tmp_path: Path) -> None:
    """After the present batch, with the step before it saved."""
    evaluated = tmp_path / "eval.jsonl"
    evaluated.write_text((DEMO / "data" / "eval.jsonl").read_text() * 20)
    run = make_run(
        tmp_path, setup=SMALL, max_steps=LONG, save_steps=LONG, eval_steps=2, eval_data_path=str(evaluated)
    )
    trainer = start(run)

    def evaluates() -> bool:
        beat = read_beat(run.heartbeat)
        return beat is not None and (beat.stage, beat.step) == ("evaluating", 2)

    wait_until(evaluates)
    os.kill(trainer.pid or 0, signal.SIGTERM)
    assert exit_code(trainer) == RunExit.STOPPED_SAVED
    end = the_end(run)
    assert (end.state, end.step) == ("stopped", 2)
    assert not any(isinstance(event, EvalEvent) for event in read_events(run.events))
    assert (run.checkpoints / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert run.adapter.exists()


def test_a_killed_trainer_is_known_as_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    trainer = start(run)
    wait_until(lambda: steps_seen(run) >= 2)
    trainer.kill()
    assert exit_code(trainer) == -signal.SIGKILL
    status = supervisor.status(run.path)
    assert (status.state, status.alive) == ("killed", False)
    assert status.step >= 2
    assert not run.adapter.exists()


def test_kill_ends_a_trainer_that_is_still_loading(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    handle = supervisor.start(run.path)
    assert supervisor.kill(run.path, patience_seconds=5)
    assert handle.wait(600).over
    assert not supervisor.kill(run.path)


@pytest.mark.parametrize("kind", ["CUDA", "CPU", "Python"])
def test_running_out_of_memory_is_told_apart(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, max_steps=6)
    assert exit_code(start(run, functools.partial(broken_steps.raises, kind))) == RunExit.OOM
    end = the_end(run)
    assert (end.state, end.step) == ("oom", BROKEN_AFTER)
    assert checkpoints.steps(run.checkpoints) == [BROKEN_AFTER]
    assert not run.adapter.exists()


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=6)
    assert exit_code(start(run, functools.partial(broken_steps.raises, "bug"))) == RunExit.BUG
    assert the_end(run).state == "failed"
    assert "KeyError: 'lost'" in the_end(run).message
    assert "Traceback" in run.log("trainer").read_text()


def test_a_poisoned_run_diverges_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run = make_run(tmp_path, max_steps=6, save_steps=1)
    assert exit_code(start(run, broken_steps.loses_a_weight)) == RunExit.DIVERGED
    end = the_end(run)
    assert (end.state, end.step) == ("diverged", BROKEN_AFTER)
    saved = sorted(path.name for path in run.checkpoints.iterdir())
    assert saved == ["checkpoint-2", "checkpoint-3"]
    weights = load_file(run.checkpoints / "checkpoint-3" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not run.adapter.exists()


@pytest.mark.parametrize(
    "change", [{"data_path": "/absent/data.jsonl"}, {"model_source": "/absent/model"}], ids=["data", "model"]
)
def test_bad_input_ends_in_one_line(tmp_path: Path, change: dict[str, str]) -> None:
    run = make_run(tmp_path, **change)
    assert exit_code(start(run)) == RunExit.BAD_INPUT
    status = supervisor.status(run.path)
    assert status.state == "refused"
    assert "/absent" in status.message
    assert "Traceback" not in run.log("trainer").read_text()


def test_a_second_trainer_by_hand_leaves_the_events_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=2)
    assert exit_code(start(run)) == RunExit.FINISHED
    before = run.events.read_bytes()
    assert exit_code(start(run)) == RunExit.BAD_INPUT
    assert run.events.read_bytes() == before
