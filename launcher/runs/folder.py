"""The run folder: the files by which trainer, sampler, keeper and watchers know each other.

Light: no torch. Paths are those of the contract; a lock is held by an open file, so it ends with its holder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.kept import checkpoints
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import user_data_dir, write_atomically
from planner.base.errors import FieldError, InputError, VramwiseError
from planner.base.settings import load_settings

LONGEST_NAME_BYTES = 100
ASKERS_SECONDS = 1
"""How long a lock may seem taken by those who only ask whether it is (locks.py), each for microseconds."""

OPEN_FOLDERS = Path("/proc/self/fd")
"""Where Linux shows a process its open files: a path through one leads to a folder that is renamed, too."""


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
    def partial_adapter(self) -> Path:
        """Where the adapter is written before it is whole."""
        return self.path / ".adapter.partial"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints (launcher/runs/kept/checkpoints.py), when the job saves any."""
        return self.path / "checkpoints"

    @property
    def fingerprint(self) -> Path:
        """What the run was started on (launcher/runs/kept/fingerprint.py)."""
        return self.path / "fingerprint.json"

    @property
    def shown(self) -> Path:
        """Where the folder is now: the path itself, unless it goes through an open folder (anchored)."""
        try:
            return self.path.readlink() if self.path.parent == OPEN_FOLDERS else self.path
        except OSError:
            return self.path

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
        """Output of a process ("trainer", "sampler" or "keeper")."""
        return self.path / f"{process}.log"

    def lock_file(self, holder: str) -> Path:
        """File whose lock says that `holder` is alive."""
        return self.path / f".{holder}.lock"

    def clear_partial(self) -> None:
        """Remove what a save of the adapter that was cut off has left."""
        checkpoints.clear_partial(self.path)
        shutil.rmtree(self.partial_adapter, ignore_errors=True)

    def read_job(self) -> TrainingJob:
        """Read job.json.

        Raises:
            InputError: it is absent or not a training job.
        """
        try:
            values = json.loads(self.job.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self.job}: not a readable training job ({error})") from error
        return TrainingJob.from_dict(values)


def default_root() -> Path:
    """Where run folders are made and looked for unless another place is named: by the settings, else in the
    person's own folder.

    Raises:
        InputError: the settings cannot be read.
    """
    kept = load_settings().runs
    return user_data_dir() / "runs" if kept is None else Path(kept).expanduser()


def check_name(name: str) -> str:
    """A name that a run may have: one component of a path that a terminal shows as it is.

    Raises:
        FieldError: it has a separator, control or direction characters, begins with a dot or a dash, begins
            or ends with a blank, or is too long.
    """
    fits = (
        0 < len(name.encode("utf-8", "replace")) <= LONGEST_NAME_BYTES
        and name.isprintable()
        and not any(separator in name for separator in "/\\")
        and name[0] not in ".-"
        and name == name.strip()
    )
    if not fits:
        raise FieldError(
            "run name",
            name,
            f"up to {LONGEST_NAME_BYTES} printable characters without / and \\, not beginning with . or -",
        )
    return name


def planned_folder(root: Path, job: TrainingJob, *, name: str | None = None) -> Path:
    """Where a run's folder would be made now, if nothing of that name is there."""
    label = re.sub(r"[^a-z0-9.]+", "-", Path(job.setup.model).name.lower()).strip("-.") or "model"
    return root / (name or f"{time.strftime('%Y%m%d-%H%M%S')}-{label[:40]}")


def create_run_folder(root: Path, job: TrainingJob, *, name: str | None = None) -> RunFolder:
    """Make a folder of its own under `root` and write job.json into it.

    The name is made of the time and the model unless given; a given name that exists is refused.

    Raises:
        FieldError: a name that no run may have.
        InputError: the folder exists or cannot be made.
    """
    if name is not None:
        check_name(name)
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
        write_first(folder, folder.job, job.to_dict())
        return folder
    raise InputError(f"{root}: no free name for a run folder")


def write_first(folder: RunFolder, path: Path, values: Mapping[str, object]) -> None:
    """Write what a new run begins with, as JSON; where that cannot be, the folder is taken back.

    Raises:
        InputError: it cannot be.
    """
    try:
        write_atomically(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def anchored(folder: RunFolder) -> Iterator[RunFolder]:
    """The folder by a path that follows it when it is renamed, for as long as it is held open; on a system
    without such paths the folder as it is.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        through = OPEN_FOLDERS / str(descriptor)
        yield RunFolder(through) if through.is_dir() else folder
    finally:
        os.close(descriptor)


@contextmanager
def hold_lock(folder: RunFolder, holder: str) -> Iterator[None]:
    """Hold the run's lock of `holder` ("trainer", "sampler", "keeper", "launcher"); the kernel frees it when
    we die.

    Raises:
        RunBusyError: another process holds it.
    """
    path = folder.lock_file(holder)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not take_lock(descriptor):
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise RunBusyError(f"{folder.shown}: another {holder} holds this run (pid {owner})")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def take_lock(descriptor: int) -> bool:
    """Lock an open file for this process alone; whether that was possible."""
    for attempt in range(ASKERS_SECONDS * 100):
        if attempt:
            time.sleep(0.01)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False
