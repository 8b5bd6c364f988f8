"""Which processes of a run are alive, asked of the kernel: each holds a lock that ends with it.

A file with a pid may be stale, cut or older than a correction of the clock; a lock is none of that.
Light: no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.folder import RunFolder

_PROC_LOCKS = Path("/proc/locks")
_PID_DIGITS = 32
"""Bytes that are read of a lock file: more than any pid has."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock; `pid` is null where this process may not know it (of another container, say)."""

    pid: int | None


def holder(path: Path, *, parent_may_be_gone: bool = False) -> Holder | None:
    """Who holds the lock of a file; None if nobody does. `parent_may_be_gone`: the lock was handed on to
    processes by one that has ended, which is no end of the lock.

    The kernel says that it is held; the pid is the one in the file if the kernel names it too, else the
    kernel's, else (where there is no /proc/locks) the file's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if _taken(descriptor):
            return None
        told = _told_pid(descriptor)
        known = _kernel_pids(os.fstat(descriptor).st_ino)
    finally:
        os.close(descriptor)
    if known is None:
        return Holder(told)
    alive = [pid for pid in known if _exists(pid)]
    if known and not alive and not parent_may_be_gone:
        # A child of the holder that outlives it has the file open: the process itself is gone.
        return None
    return Holder(told if told in alive else next(iter(alive), None))


def live_pid(folder: RunFolder, process: str) -> int | None:
    """pid of a run's process ("trainer", "sampler" or "keeper") if it is alive and its pid can be known."""
    found = holder(folder.lock_file(process))
    return None if found is None else found.pid


def is_alive(folder: RunFolder) -> bool:
    """Whether something of the run goes on: its trainer lives, or the keeper that may start another."""
    return any(holder(folder.lock_file(process)) is not None for process in ("trainer", "keeper"))


def _taken(descriptor: int) -> bool:
    """Whether the lock was free, and so was ours for a moment: a shared one, which other askers share."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _told_pid(descriptor: int) -> int | None:
    with contextlib.suppress(ValueError, OSError):
        pid = int(os.pread(descriptor, _PID_DIGITS, 0).split(b"\n")[0])
        return pid if pid > 0 else None
    return None


def _kernel_pids(inode: int) -> list[int] | None:
    """pids that the kernel says hold a lock of a file with this inode; None where it tells nobody."""
    try:
        lines = _PROC_LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return [pid for pid, found in _flocks(lines) if found == inode]


def _flocks(lines: list[str]) -> Iterator[tuple[int, int]]:
    """pid and inode of each line of /proc/locks: "1: FLOCK  ADVISORY  WRITE 4242 08:01:131 0 EOF"."""
    for line in lines:
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK" or words[3] != "WRITE":
            continue
        with contextlib.suppress(ValueError):
            pid, inode = int(words[4]), int(words[5].rsplit(":", 1)[-1])
            if pid > 0:
                yield pid, inode


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
