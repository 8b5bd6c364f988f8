"""Start a run's keeper, say where the run stands, stop it: all through the files of the run folder.

Light: no torch. Nothing here needs to stay alive for the run to go on; any number of watchers may ask.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launcher.runs import state
from launcher.runs.attempts import Attempt, add_attempt, first_attempt, read_attempts
from launcher.runs.ends import RunExit, exit_code
from launcher.runs.folder import RunBusyError, RunFolder, hold_lock
from launcher.runs.locks import holder, is_alive
from launcher.runs.minding import ranks, stopping
from launcher.runs.minding.gpu_lock import gpus_of, take_gpu
from launcher.runs.minding.spawn import spawn
from launcher.runs.state import RunStatus
from planner.base.errors import InputError

POLL_SECONDS = 0.1
KEEPER_ANSWERS_SECONDS = 3.0
"""A keeper that has not obeyed after this stands still; it looks five times a second."""
KEEPER_START_SECONDS = 120.0
"""A keeper imports no torch; on a machine that is busy swapping this is still enough."""


@dataclass(frozen=True, slots=True)
class RunHandle:
    """A started run, as its starter sees it."""

    folder: RunFolder
    keeper: subprocess.Popen[bytes]

    def wait(self, timeout_seconds: float | None = None) -> RunStatus:
        """Wait for the run to end: for the keeper, and for a trainer that has outlived its keeper.

        Raises:
            TimeoutError: it goes on then.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while self.goes_on():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the run goes on after {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)
        return status(self.folder.path)

    def goes_on(self, folder: RunFolder | None = None) -> bool:
        """Whether something of the run is alive; `folder` is where it is now, if it may have been moved."""
        return self.keeper.poll() is None or is_alive(folder or self.folder)


def start(run_dir: Path) -> RunHandle:
    """Start the keeper of a created run folder, which starts trainer and sampler.

    Raises:
        RunBusyError: the run has been started before, or is being started by another process.
        GpuBusyError: another run trains on its GPU.
        InputError: job.json is absent or not a training job, or the run folder cannot be written.
    """
    folder = RunFolder(run_dir.resolve())
    job = folder.read_job()
    with _one_line(folder), hold_lock(folder, "launcher"):
        now = status(folder.path)
        if now.state != "created":
            raise RunBusyError(f"{folder.path}: this run has been started before and is {now.state}")
        return launch(folder, first_attempt(job))


def resume(run_dir: Path, attempt: Attempt) -> RunHandle:
    """Start the keeper of a run that has ended once more, for an attempt (kept/resumption.py).

    Raises:
        RunBusyError: the run goes on, or another process has begun an attempt since.
        GpuBusyError: another run trains on its GPU.
        InputError: the attempts cannot be read, or the run folder cannot be written.
    """
    folder = RunFolder(run_dir.resolve())
    with _one_line(folder), hold_lock(folder, "launcher"):
        attempts = read_attempts(folder.attempts)
        if status(folder.path).alive or (attempts and attempts[-1].number >= attempt.number):
            raise RunBusyError(f"{folder.path}: this run is going on already")
        return launch(folder, attempt)


@contextmanager
def _one_line(folder: RunFolder) -> Iterator[None]:
    """What the system refuses, as a line for a person."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder.path
        raise InputError(f"{where}: the run cannot be started ({error.strerror})") from error


def launch(folder: RunFolder, attempt: Attempt) -> RunHandle:
    """Write down an attempt, start the keeper for it, and wait until that is there.

    The caller holds the lock "launcher".

    Raises:
        GpuBusyError: another run trains on its GPU.
        OSError: there is no process to be had, or the folder cannot be written.
    """
    gpu: list[int] = []
    try:
        gpu.extend(take_gpu(uuid, folder) for uuid in gpus_of(attempt.apply(folder.read_job())))
        folder.stop.unlink(missing_ok=True)
        add_attempt(folder.attempts, attempt)
        keeper = spawn(folder, "keeper", "launcher.runs.keeper", arguments=map(str, gpu), descriptors=gpu)
    finally:
        for descriptor in gpu:
            os.close(descriptor)
    deadline = time.monotonic() + KEEPER_START_SECONDS
    while keeper.poll() is None and holder(folder.lock_file("keeper")) is None:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS / 5)
    return RunHandle(folder, keeper)


def status(run_dir: Path) -> RunStatus:
    """Where the run stands, from its files and locks.

    Raises:
        InputError: the folder holds nothing of a run.
    """
    return state.status(run_dir)


def end_code(run: RunStatus) -> RunExit:
    """The exit code of a run that is over."""
    return exit_code(run.state)


def request_stop(run_dir: Path) -> None:
    """Ask the trainer to stop after the current step and save; returns at once."""
    stopping.ask(RunFolder(run_dir), stopping.AFTER_STEP)


@dataclass(slots=True)
class Ending:
    """Sees to it that a run ends at once when that was asked for: its keeper does it; where the keeper is
    gone or stands still, signals of ours do. `tick` does what is due and returns at once.
    """

    folder: RunFolder
    _how: str | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)
    _ender: stopping.Ender = field(init=False)

    def __post_init__(self) -> None:
        self._ender = stopping.Ender(self._send)

    def tick(self) -> None:
        """Do what is due."""
        how, now = stopping.asked(self.folder), time.monotonic()
        if how is None or how == stopping.AFTER_STEP:
            return
        if how != self._how:
            self._how, self._since = how, now
        allowed = KEEPER_ANSWERS_SECONDS + (0.0 if how == stopping.KILL else stopping.PATIENCE_SECONDS)
        if holder(self.folder.lock_file("keeper")) is None or now - self._since > allowed:
            self._ender.tick(how, now)

    def _send(self, number: int) -> None:
        ranks.send(ranks.live_ranks(self.folder, ranks.MOST_LOCAL), number)


def kill(run_dir: Path, *, patience_seconds: float = stopping.PATIENCE_SECONDS) -> bool:
    """End the run now: a stop at once, and SIGKILL when the trainer outlives the patience; waits for it.

    Returns whether there was a run to end. Nothing that it has not saved yet is kept.
    """
    folder = RunFolder(run_dir)
    if not is_alive(folder):
        return False
    stopping.ask(folder, stopping.NOW)
    ending, begun = Ending(folder), time.monotonic()
    while is_alive(folder):
        waited = time.monotonic() - begun
        if waited > patience_seconds:
            stopping.ask(folder, stopping.KILL)
        if waited > patience_seconds + 3 * KEEPER_ANSWERS_SECONDS:
            break
        ending.tick()
        time.sleep(POLL_SECONDS)
    return True
