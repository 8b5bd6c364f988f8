"""Removing a run that is over, at once for everybody who lists runs."""

from __future__ import annotations

import shutil

from launcher.runs import supervisor
from launcher.runs.folder import RunBusyError, RunFolder, hold_lock
from planner.base.errors import InputError


def refuse_alive(folder: RunFolder) -> None:
    """See that a run is over.

    Raises:
        InputError: it goes on.
    """
    status = supervisor.status(folder.path)
    if status.alive:
        raise InputError(f"{folder.path}: this run goes on ({status.state}); stop it first")


def remove(folder: RunFolder) -> None:
    """Remove a run's folder.

    Raises:
        InputError: the run is alive or just being started, or the folder cannot be removed.
    """
    refuse_alive(folder)
    gone = folder.path.with_name(f".deleting-{folder.path.name}")
    try:
        with hold_lock(folder, "launcher"), hold_lock(folder, "keeper"), hold_lock(folder, "trainer"):
            folder.path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise InputError(f"{folder.path}: cannot be deleted ({error.strerror})") from error
    except RunBusyError as error:
        raise InputError(str(error)) from error
