"""The run folder: the files by which trainer, sampler, keeper and watchers know each other.

Light: no torch. Paths are those of the contract; a lock is held by an open file, so it ends with its holder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.training_job import TrainingJob
from planner.base.data_files import write_atomically
from planner.base.errors import InputError, VramwiseError


class RunBusyError(VramwiseError):
    """Another process holds the run, or the run has already been started."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def job(self) -> Path:
        """TrainingJob as JSON."""
        return self.path / "job.json"

    @property
    def plan(self) -> Path:
        """The Plan as JSON; absent for a job made by hand."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """The trainer's events, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """The sampler's samples, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def stop(self) -> Path:
        """Its presence asks the trainer to stop after the current step."""
        return self.path / "stop"

    @property
    def adapter(self) -> Path:
        """The trained adapter, or the trained model of a full fine-tuning; appears whole or not at all."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints, when the job saves any."""
        return self.path / "checkpoints"

    @property
    def attempts(self) -> Path:
        """A line an attempt (launcher/runs/attempts.py)."""
        return self.path / "attempts.jsonl"

    @property
    def heartbeat(self) -> Path:
        """The trainer's last sign of life (launcher/runs/heartbeat.py)."""
        return self.path / "heartbeat.json"

    @property
    def record(self) -> Path:
        """The RunRecord as JSON."""
        return self.path / "record.json"

    @property
    def report(self) -> Path:
        """What became of the run (launcher/runs/report), as JSON."""
        return self.path / "report.json"

    @property
    def report_page(self) -> Path:
        """The same as Markdown."""
        return self.path / "report.md"

    @property
    def loss_curve(self) -> Path:
        """The picture of that page."""
        return self.path / "loss.svg"

    @property
    def tracking(self) -> Path:
        """What trackers write (launcher/runs/trackers.py)."""
        return self.path / "tracking"

    def log(self, process: str) -> Path:
        """Output of a process ("trainer" or "sampler")."""
        return self.path / f"{process}.log"

    def identity(self, process: str) -> Path:
        """pid and creation time of a process."""
        return self.path / f"{process}.json"

    def lock_file(self, holder: str) -> Path:
        """File whose lock says that `holder` is alive."""
        return self.path / f".{holder}.lock"

    def read_job(self) -> TrainingJob:
        """Read job.json.

        Raises:
            InputError: it is absent or not a training job.
        """
        try:
            values = json.loads(self.job.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.job}: not a readable training job ({error})") from error
        return TrainingJob.from_dict(values)


def planned_folder(root: Path, job: TrainingJob, *, name: str | None = None) -> Path:
    """Where a run's folder would be made now, if nothing of that name is there."""
    label = re.sub(r"[^a-z0-9.]+", "-", Path(job.setup.model).name.lower()).strip("-.") or "model"
    return root / (name or f"{time.strftime('%Y%m%d-%H%M%S')}-{label[:40]}")


def refuse_taken(path: Path) -> None:
    """See that nothing has the name that was given to a run.

    Raises:
        InputError: something has.
    """
    if path.exists():
        raise InputError(f"{path}: the run folder exists already")


def create_run_folder(root: Path, job: TrainingJob, *, name: str | None = None) -> RunFolder:
    """Make a folder of its own under `root` and write job.json into it.

    The name is made of the time and the model unless given; a given name that exists is refused.

    Raises:
        InputError: the folder exists or cannot be made.
    """
    stem = planned_folder(root, job, name=name).name
    for attempt in range(1000):
        path = root / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if name is not None:
                raise InputError(f"{path}: the run folder exists already") from error
            continue
        except OSError as error:
            raise InputError(f"{path}: the run folder cannot be made ({error.strerror})") from error
        folder = RunFolder(path.resolve())
        write_atomically(folder.job, json.dumps(job.to_dict(), indent=2) + "\n")
        return folder
    raise InputError(f"{root}: no free name for a run folder")


@contextmanager
def hold_lock(folder: RunFolder, holder: str) -> Iterator[None]:
    """Hold the run's lock of `holder` ("trainer", "sampler", "launcher"); the kernel frees it when we die.

    Raises:
        RunBusyError: another process holds it.
    """
    path = folder.lock_file(holder)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise RunBusyError(f"{folder.path}: another {holder} holds this run (pid {owner})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)
