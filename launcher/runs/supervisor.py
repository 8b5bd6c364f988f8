"""Start a run's processes, say where it stands, stop it: all through the files of the run folder.

Light: no torch. Nothing here needs to stay alive for the run to go on; any number of watchers may ask.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from launcher.runs.allocator import allocator_environment
from launcher.runs.attempts import Attempt, add_attempt, read_attempts
from launcher.runs.events import AttemptEvent, EndEvent, LogEvent, StartEvent, WarningEvent, read_events
from launcher.runs.folder import RunBusyError, RunFolder, hold_lock
from planner.base.data_files import write_atomically
from planner.base.errors import MissingExtraError

# Two readings of a process's creation time may differ by the clock's correction in between.
CREATE_TIME_TOLERANCE_SECONDS = 2.0
POLL_SECONDS = 0.1
_PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Where a run stands.

    `state` is "created" (never started), "starting" (no event of training yet), "running", one of the end
    states, or "killed" (the trainer is gone without an end event). `pid` is the trainer's while it is alive.
    """

    state: str
    step: int
    total_steps: int | None
    message: str
    pid: int | None

    @property
    def alive(self) -> bool:
        """Whether the trainer process exists."""
        return self.pid is not None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen: started, and the trainer is gone."""
        return self.state != "created" and not self.alive


@dataclass(frozen=True, slots=True)
class RunHandle:
    """A started run, as its starter sees it."""

    folder: RunFolder
    trainer: subprocess.Popen[bytes]
    sampler: subprocess.Popen[bytes]

    def wait(self, timeout_seconds: float | None = None) -> RunStatus:
        """Wait for the trainer and then the sampler to end.

        Raises:
            TimeoutError: the trainer is still alive then.
        """
        try:
            self.trainer.wait(timeout_seconds)
            self.sampler.wait(10.0)
        except subprocess.TimeoutExpired as error:
            if self.trainer.poll() is None:
                raise TimeoutError(f"the trainer is alive after {timeout_seconds:g} s") from error
        return status(self.folder.path)


def start(run_dir: Path) -> RunHandle:
    """Start trainer and sampler of a created run folder, each in a session of its own, output to files.

    Raises:
        RunBusyError: the run has been started before, or is being started by another process.
        InputError: job.json is absent or not a training job.
    """
    folder = RunFolder(run_dir.resolve())
    folder.read_job()
    with hold_lock(folder, "launcher"):
        now = status(folder.path)
        if now.state != "created":
            raise RunBusyError(f"{folder.path}: this run has been started before and is {now.state}")
        return _launch(folder)


def resume(run_dir: Path, attempt: Attempt) -> RunHandle:
    """Start trainer and sampler of a run that has ended once more, for an attempt (resumption.py).

    Raises:
        RunBusyError: the run goes on, or another process has begun an attempt since.
        InputError: the attempts cannot be read.
        OSError: the attempt cannot be written.
    """
    folder = RunFolder(run_dir.resolve())
    with hold_lock(folder, "launcher"):
        attempts = read_attempts(folder.attempts)
        if status(folder.path).alive or (attempts and attempts[-1].number >= attempt.number):
            raise RunBusyError(f"{folder.path}: this run is going on already")
        folder.stop.unlink(missing_ok=True)
        add_attempt(folder.attempts, attempt)
        return _launch(folder)


def _launch(folder: RunFolder) -> RunHandle:
    trainer = _spawn(folder, "trainer", "launcher.training.train", allocator_environment(os.environ))
    sampler = _spawn(folder, "sampler", "launcher.runs.sampler", {})
    return RunHandle(folder, trainer, sampler)


def _spawn(
    folder: RunFolder, process: str, module: str, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # -P and the project's own root: a file beside the user's data must not shadow a library.
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(_PROJECT_ROOT), *([inherited] if inherited else [])])
    with folder.log(process).open("ab") as log:
        child = subprocess.Popen(  # noqa: S603 (our own interpreter and module, no shell)
            [sys.executable, "-P", "-m", module, str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **variables, "PYTHONPATH": path},
        )
    write_identity(folder, process, child.pid)
    return child


def write_identity(folder: RunFolder, process: str, pid: int) -> None:
    """Write pid and creation time, so that a later process with the same pid is not taken for this one."""
    psutil = _psutil()
    with contextlib.suppress(psutil.NoSuchProcess):
        values = {"pid": pid, "create_time": psutil.Process(pid).create_time()}
        write_atomically(folder.identity(process), json.dumps(values) + "\n")


def live_pid(folder: RunFolder, process: str) -> int | None:
    """pid of a run's process ("trainer" or "sampler") if that very process is alive."""
    try:
        values = json.loads(folder.identity(process).read_text(encoding="utf-8"))
        pid, created = int(values["pid"]), float(values["create_time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    psutil = _psutil()
    try:
        found = psutil.Process(pid)
        if found.status() == psutil.STATUS_ZOMBIE:
            return None
        same = abs(found.create_time() - created) <= CREATE_TIME_TOLERANCE_SECONDS
    except psutil.NoSuchProcess:
        return None
    return pid if same else None


def status(run_dir: Path) -> RunStatus:
    """Where the run stands, from its files and the process table.

    Raises:
        InputError: the folder holds no job.
    """
    folder = RunFolder(run_dir)
    # The process first: an end event written in between is then seen, not mistaken for a kill.
    pid = live_pid(folder, "trainer")
    events = read_events(folder.events)
    step, message = 0, ""
    total: int | None = None
    ended: EndEvent | None = None
    for event in events:
        if isinstance(event, AttemptEvent):
            ended, step, message = None, event.from_step, ""
        elif isinstance(event, StartEvent):
            total = event.total_steps
        elif isinstance(event, LogEvent):
            step = event.step
        elif isinstance(event, WarningEvent):
            message = event.message
        elif isinstance(event, EndEvent):
            ended = event
    if ended is not None:
        state, step, message = ended.state, ended.step, ended.message
    elif pid is not None:
        state = "running" if total is not None else "starting"
    elif not events and not folder.identity("trainer").exists():
        folder.read_job()
        state = "created"
    else:
        state, message = "killed", f"the trainer is gone without a word after step {step}"
    return RunStatus(state=state, step=step, total_steps=total, message=message, pid=pid)


def request_stop(run_dir: Path) -> None:
    """Ask the trainer to stop after the current step and save; returns at once."""
    RunFolder(run_dir).stop.touch()


def kill(run_dir: Path, *, patience_seconds: float = 10.0) -> bool:
    """End the trainer now: SIGTERM twice (stop, then stop at once), SIGKILL when it outlives the patience.

    Returns whether there was a trainer to end. Nothing that it has not saved yet is kept.
    """
    folder = RunFolder(run_dir)
    pid = live_pid(folder, "trainer")
    if pid is None:
        return False
    # The first SIGTERM asks for a stop after the step, the second for one at once.
    steps = (
        (signal.SIGTERM, 2 * POLL_SECONDS),
        (signal.SIGTERM, patience_seconds),
        (signal.SIGKILL, patience_seconds),
    )
    for number, seconds in steps:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if _gone(folder, seconds):
            break
    return True


def _gone(folder: RunFolder, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if live_pid(folder, "trainer") is None:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _psutil() -> ModuleType:
    try:
        return importlib.import_module("psutil")
    except ImportError as error:
        raise MissingExtraError("watching a run", "psutil") from error
