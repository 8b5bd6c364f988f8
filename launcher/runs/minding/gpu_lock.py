"""A lock for each GPU of this machine, held by the run that trains on it: by its keeper and its trainer.

The lock is taken by who starts the run, handed on as an open file, and free when the last of the two is gone.
It lies in the person's data folder, so runs of other people are not seen. Light: no torch.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from launcher.runs.folder import RunFolder, take_lock
from launcher.runs.locks import holder, live_pid
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import user_data_dir
from planner.base.errors import InputError

WAIT_SECONDS = 1.0
_MOST_BYTES = 8192
"""That are read of what a lock says of its holder."""


class GpuBusyError(InputError):
    """Another run trains on the GPU."""


def gpus_of(job: TrainingJob) -> list[str]:
    """The UUIDs of the GPUs that a job trains on here; none where there is none: the CPU has no lock.

    Raises:
        InputError: there are fewer than it trains on.
    """
    found = [gpu_at(job.gpu_index + local) for local in range(job.local_processes)]
    if any(found) and not all(found):
        there = len([uuid for uuid in found if uuid is not None])
        raise InputError(
            f"{len(found)} GPUs are needed from number {job.gpu_index} on, and there are {there}"
        )
    return [uuid for uuid in found if uuid is not None]


def gpu_at(position: int) -> str | None:
    """The UUID of the visible GPU at a position; None where there is none."""
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        gpus = local_gpus()
    except NoGpuError:
        return None
    return gpus[position].uuid if position < len(gpus) else None


def lock_path(uuid: str) -> Path:
    """The file whose lock says that a GPU is taken."""
    return user_data_dir() / "locks" / f"gpu-{re.sub(r'[^A-Za-z0-9-]', '-', uuid)}.lock"


def take_gpu(uuid: str, folder: RunFolder) -> int:
    """Take a GPU for a run; returns the open file to hand on to its processes and to close then.

    Raises:
        GpuBusyError: another run trains on it.
        OSError: the lock cannot be written.
    """
    path = lock_path(uuid)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not take_lock(descriptor):
        os.close(descriptor)
        raise GpuBusyError(who_holds(uuid) or f"GPU {uuid} is taken by another run")
    os.ftruncate(descriptor, 0)
    told = json.dumps({"run": str(folder.path), "since": time.time()})
    os.pwrite(descriptor, told.encode("utf-8"), 0)
    return descriptor


def who_holds(uuid: str) -> str | None:
    """Who trains on a GPU, in a sentence; None if nobody does."""
    path = lock_path(uuid)
    if holder(path, parent_may_be_gone=True) is None:
        return None
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST_BYTES))
        folder, since = RunFolder(Path(values["run"])), float(values["since"])
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return f"GPU {uuid} is taken by another run"
    pid = live_pid(folder, "trainer") or live_pid(folder, "keeper")
    process = "" if pid is None else f", process {pid}"
    return f"the run {folder.path} trains on GPU {uuid} since {began}{process}"


def wait_for_gpu(uuid: str, tell: Callable[[str], None]) -> None:
    """Return when nobody trains on a GPU; who does is told once."""
    told = None
    while (busy := who_holds(uuid)) is not None:
        if busy != told:
            tell(f"{busy}; waiting for its end")
            told = busy
        time.sleep(WAIT_SECONDS)


def refuse_busy_gpu(uuid: str) -> None:
    """See that nobody trains on a GPU.

    Raises:
        GpuBusyError: a run does.
    """
    busy = who_holds(uuid)
    if busy is not None:
        raise GpuBusyError(f"{busy}; --wait waits for its end")
