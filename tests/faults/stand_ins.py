"""Processes in place of trainer and sampler that cost a tenth of a second to start: no training stack.

The stand-in of the trainer does with files, locks and signals what launcher.training.train does.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from launcher.runs.attempts import read_attempts
from launcher.runs.events import AttemptEvent, CheckpointEvent, EventWriter, LogEvent, StartEvent
from launcher.runs.folder import RunFolder, anchored, create_run_folder, hold_lock
from launcher.runs.heartbeat import STACKS_SIGNAL, HeartbeatWriter
from launcher.runs.kept import checkpoints
from launcher.runs.training_job import TrainingJob
from launcher.training.ending import RunEnd, StopRequest
from planner.commands.program import run_as_program

ROOT = Path(__file__).resolve().parents[2]
ORDER = "stand-in.json"
"""In the run folder: what the stand-in of the trainer is to do."""


def order(folder: RunFolder, **values: Any) -> None:
    """Say what the trainer is to do: see `_Order`."""
    (folder.path / ORDER).write_text(json.dumps(values))


def order_next(root: Path, **values: Any) -> None:
    """Say what the trainer of the run that `train` makes under a folder is to do."""
    root.mkdir(parents=True, exist_ok=True)
    (root / ORDER).write_text(json.dumps(values))


def train(root: Path) -> int:
    """`vramwise train`, from the moment on in which it has planned: the run is called `run`."""
    from launcher.commands import train as command
    from launcher.runs import job as jobs
    from launcher.runs import supervisor
    from planner.setup.training_setup import TrainingSetup

    def create(place: Path, *_: Any, name: str) -> RunFolder:
        setup = TrainingSetup(model="demo", max_length=64)
        job = TrainingJob(setup=setup, model_source="m", data_path="d.jsonl", max_steps=9)
        folder = create_run_folder(place, job, name=name)
        (place / ORDER).rename(folder.path / ORDER)
        return folder

    jobs.create_planned_run = create
    supervisor.spawn = spawn_stand_in
    nothing: Any = None
    return command._start_and_follow(root, nothing, nothing, "run")


def spawn_stand_in(
    folder: RunFolder,
    process: str,
    module: str,
    variables: object = None,
    *,
    arguments: Iterable[str] = (),
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """In place of launcher.runs.minding.spawn.spawn."""
    with folder.log(process).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.stand_ins", process, str(folder.shown), *arguments],
            pass_fds=descriptors,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def keeper_with_stand_ins(arguments: list[str]) -> int:
    """launcher.runs.keeper.main with these processes; the folder's order may name limits."""
    from launcher.runs import keeper
    from launcher.runs.minding.hang import HangLimits

    values = json.loads((Path(arguments[0]) / ORDER).read_text())
    keeper.spawn = spawn_stand_in
    keeper.Keeper = functools.partial(
        keeper.Keeper,
        limits=HangLimits(**values.get("limits", {})),
        patience_seconds=values.get("patience", 10.0),
    )
    return keeper.main(arguments)


def _trainer(folder: RunFolder, values: dict[str, Any]) -> int:
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    stop = StopRequest(folder.stop)
    stop.install()
    time.sleep(values.get("loads_for", 0.0))
    steps, step_seconds = values.get("steps", 10**6), values.get("step_seconds", 0.02)
    saves = values.get("saves", 0)
    with (
        anchored(folder) as folder,
        hold_lock(folder, "trainer"),
        HeartbeatWriter(folder.heartbeat) as beats,
        EventWriter(folder.events) as writer,
        (end := RunEnd(writer)),
    ):
        stop.file = folder.stop
        attempt = read_attempts(folder.attempts)[-1]
        number, reason = attempt.number, attempt.reason
        writer.write(
            AttemptEvent(time=time.time(), number=number, reason=reason, from_step=attempt.from_step)
        )
        beats.beat("loading", 0)
        writer.write(
            StartEvent(time=time.time(), total_steps=steps, environment={}, first_step=attempt.from_step)
        )
        for step in range(attempt.from_step + 1, steps + 1):
            beats.beat("training", step - 1)
            time.sleep(step_seconds)
            if step == values.get("hangs_at") and number <= values.get("hangs", 1):
                time.sleep(10**6)
            if step == values.get("late_step"):
                time.sleep(values["late_seconds"])
            if step == values.get("dies_at"):
                os.kill(os.getpid(), values["by"])
            writer.write(_log(step, step_seconds))
            end.step = step
            if saves and step % saves == 0:
                _save(folder, writer, step)
            if stop.requested():
                if values.get("deaf"):
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
                    time.sleep(10**6)
                _save(folder, writer, step)
                end.stopped(f"stopped on request after step {step}; the adapter is saved")
                break
        folder.adapter.mkdir(exist_ok=True)
    return end.code


WEIGHTS = "adapter_model.safetensors"


def save(folder: RunFolder, step: int) -> Path:
    """A whole checkpoint of a step; returns where it is."""
    staged = checkpoints.stage(folder.checkpoints, step)
    (staged / WEIGHTS).write_bytes(b"weights")
    return checkpoints.publish(staged, folder.checkpoints).path


def _save(folder: RunFolder, writer: EventWriter, step: int) -> None:
    writer.write(
        CheckpointEvent(
            time=time.time(), step=step, path=str(folder.shown / save(folder, step).relative_to(folder.path))
        )
    )


def _log(step: int, seconds: float) -> LogEvent:
    return LogEvent(
        time=time.time(),
        step=step,
        loss=1.0,
        learning_rate=None,
        grad_norm=None,
        tokens_per_second=100.0,
        step_seconds=seconds,
    )


def _sampler(folder: RunFolder, values: dict[str, Any]) -> int:
    from launcher.runs import sampler

    if values.get("sampler_dies"):
        return 3
    sampler.SAMPLE_SECONDS = 0.1
    return sampler.main([str(folder.path)])


def main(process: str, run: str, *rest: str) -> int:
    """Be the trainer, the sampler or the keeper of a run."""
    if process == "train":
        run_as_program("vramwise", lambda: train(Path(run)))
    if process == "keeper":
        return keeper_with_stand_ins([run, *rest])
    folder = RunFolder(Path(run))
    values = json.loads((folder.path / ORDER).read_text())
    return _trainer(folder, values) if process == "trainer" else _sampler(folder, values)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
