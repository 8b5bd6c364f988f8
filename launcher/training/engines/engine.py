"""`python -m launcher.training.engines.engine RUN_DIR` has another trainer do the job of a run folder.

It is to the keeper what launcher.training.train is: it holds the trainer's lock, tells events, gives signs of
life, obeys stops and ends with the same codes. It makes the rows of the data as for our own trainer, so that
the same tokens are learned, and starts the script of the job in the trainer's own environment.
"""

from __future__ import annotations

import faulthandler
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher.runs.ends import RunExit
from launcher.runs.events import (
    AdapterEvent,
    Event,
    EventWriter,
    LogEvent,
    MemoryEvent,
    StartEvent,
    WarningEvent,
)
from launcher.runs.folder import RunBusyError, RunFolder, anchored, hold_lock
from launcher.runs.heartbeat import STACKS_SIGNAL, HeartbeatWriter
from launcher.runs.kept import checkpoints
from launcher.runs.minding.deaths import signal_name
from launcher.runs.training_job import TrainingJob
from launcher.training.card import ChosenGpu, choose_gpu
from launcher.training.ending import RunEnd, StopRequest
from launcher.training.engines.child import Child
from launcher.training.engines.script import REPORTER, ROWS, SCRIPT, WORK, script_of
from launcher.training.opening import begin_attempt, refuse_started, set_environment
from launcher.training.stages import Stages
from planner.base.data_files import write_atomically
from planner.base.errors import InputError, shorten
from planner.base.importing import uncollected

TITLE = "Unsloth"
VARIABLES = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": f"{WORK}/compiled"}
"""It tells nobody what it runs on (unsloth/models/_utils.py:4886), and writes into the run folder alone."""
NEEDED = ("adapter_config.json", "adapter_model.safetensors")
NOTHING_SAVED = "stopped before the first step; there is nothing to save"


def main(arguments: list[str]) -> int:
    """Have the job of the folder named done; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.training.engines.engine RUN_DIR", file=sys.stderr)
        return RunExit.BAD_INPUT
    folder = RunFolder(Path(arguments[0]).resolve())
    stop = StopRequest(folder.stop)
    stop.install()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    with ExitStack() as open_ones:
        try:
            open_ones.enter_context(hold_lock(folder, "trainer"))
            held = open_ones.enter_context(anchored(folder))
            refuse_started(folder)
            writer = open_ones.enter_context(EventWriter(held.events))
            beats = open_ones.enter_context(HeartbeatWriter(held.heartbeat))
        except (RunBusyError, InputError, OSError) as error:
            print(error, file=sys.stderr)
            return RunExit.BAD_INPUT
        stop.file = held.stop
        stages = Stages(writer.write, beats.beat)
        with RunEnd(writer) as end:
            try:
                _run(held, writer, stop, end, stages)
            finally:
                shutil.rmtree(held.path / WORK, ignore_errors=True)
                held.clear_partial()
        if end.state != "finished":
            print(f"{end.state}: {end.message}", file=sys.stderr)
        return end.code


def _run(folder: RunFolder, writer: EventWriter, stop: StopRequest, end: RunEnd, stages: Stages) -> None:
    job, _ = begin_attempt(folder, writer)
    stages.enter("loading", "loading the libraries")
    gpu = choose_gpu(job)
    if gpu is not None:
        end.room = gpu.room
    set_environment(job, folder)
    stages.enter("loading", "reading the data")
    _write_rows(job, folder, writer)
    partial = folder.partial_adapter.name
    folder.clear_partial()
    write_atomically(folder.path / SCRIPT, script_of(job, partial))
    shutil.copyfile(Path(__file__).with_name(f"{REPORTER}.py"), folder.path / f"{REPORTER}.py")
    if stop.requested():
        end.stopped(NOTHING_SAVED)
        return
    stages.enter("loading", f"{TITLE} and the weights")
    variables = {**VARIABLES, "HF_DATASETS_CACHE": f"{WORK}/cache"}
    with Child(str(job.engine_python), SCRIPT, folder.shown, variables) as child:
        told = _Told(writer, stages, gpu, child)
        asked = False
        for line in child.lines():
            if stop.requested() and not asked:
                asked = True
                if not told.started:
                    end.stopped(NOTHING_SAVED)
                    return
                child.ask_for_stop()
            if line is not None:
                told.take(line)
                end.step = told.step
        code = child.ended()
    if told.error is not None or code:
        _tell_failure(end, told, code)
        return
    _publish(folder, writer, told.step)
    if asked and told.step < told.total_steps:
        end.stopped(f"stopped on request after step {told.step}; the adapter is saved")


def _write_rows(job: TrainingJob, folder: RunFolder, writer: EventWriter) -> None:
    """The data as our own trainer would learn it, token by token."""
    with uncollected():
        from launcher.training.several.rows import made_rows

    def warn(message: str) -> None:
        writer.write(WarningEvent(time=time.time(), message=shorten(message, 500).strip("'\"")))

    _, rows, _ = made_rows(job, warn)
    place = folder.path / ROWS
    place.parent.mkdir(exist_ok=True)
    rows.to_json(str(place))


@dataclass(slots=True)
class _Told:
    """What the trainer has told so far, written as events."""

    writer: EventWriter
    stages: Stages
    gpu: ChosenGpu | None
    child: Child
    step: int = 0
    total_steps: int = 0
    started: bool = False
    error: Mapping[str, Any] | None = None
    _peaks: dict[str, MemoryEvent] = field(default_factory=dict)

    def take(self, line: Mapping[str, Any]) -> None:
        """Tell a line of it to whoever follows the run."""
        values = {name: value for name, value in line.items() if name != "kind"}
        self.step = max(self.step, int(values.get("step", 0)))
        match line["kind"]:
            case "stage":
                self.stages.enter("loading", values["message"])
            case "start":
                self.started, self.total_steps = True, values["total_steps"]
                self._write(StartEvent(time=time.time(), **values))
                self.stages.beat("training", 0)
            case "beat":
                self.stages.beat("training", self.step)
            case "log":
                self._write(LogEvent(time=time.time(), **values))
            case "memory":
                self._remember(values)
                self.stages.beat("training" if self.started else "loading", self.step)
            case "trained":
                self.stages.enter("saving", "the adapter")
            case "error":
                self.error = values

    def _write(self, event: Event) -> None:
        self.writer.write(event)

    def _remember(self, values: dict[str, Any]) -> None:
        """Tell a phase's peaks where one has grown."""
        known = self._peaks.get(values["phase"])
        figures = {name: values[name] for name in ("allocated_bytes", "reserved_bytes")}
        figures["process_bytes"] = self._process_bytes() if known is None or self.step < 3 else None
        if known is not None:
            for name, value in figures.items():
                before = getattr(known, name)
                figures[name] = before if value is None or (before or 0) >= value else value
        event = MemoryEvent(time=time.time(), phase=values["phase"], step=self.step, **figures)
        if known is None or any(getattr(known, name) != figures[name] for name in figures):
            self._peaks[values["phase"]] = event
            self._write(event)

    def _process_bytes(self) -> int | None:
        """What the driver shows as used since the start, or without a GPU the trainer's resident memory."""
        if self.gpu is not None:
            return self.gpu.used_since_start()
        try:
            return int(psutil.Process(self.child.process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return None


def _tell_failure(end: RunEnd, told: _Told, code: int) -> None:
    """End the run by what the trainer said of its error, else by how its process ended."""
    if told.error is not None:
        name, message = told.error["name"], told.error["message"]
        end.state = "oom" if told.error["out_of_memory"] else "failed"
        end.message = f"{TITLE}: {name}: {message}"
        if name == "FloatingPointError":
            end.state, end.message = "diverged", message
    elif code < 0:
        end.state, end.message = (
            "killed",
            f"{TITLE} was ended by {signal_name(-code)} after step {told.step:,}",
        )
    else:
        end.state, end.message = "failed", f"{TITLE} ended with exit code {code}: see trainer.log"


def _publish(folder: RunFolder, writer: EventWriter, step: int) -> None:
    """Have the adapter appear whole.

    Raises:
        InputError: the trainer has not saved one.
    """
    missing = [name for name in NEEDED if not (folder.partial_adapter / name).is_file()]
    if missing:
        raise InputError(f"{TITLE} ended without an adapter: {', '.join(missing)} is not there")
    checkpoints.place(folder.partial_adapter, folder.adapter)
    shown = str(folder.shown / folder.adapter.name)
    writer.write(AdapterEvent(time=time.time(), step=step, path=shown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
