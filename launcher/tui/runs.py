"""Run folders to pick from."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.runs.folder import RunFolder
from launcher.runs.locks import is_alive
from launcher.runs.state import is_run, status
from planner.base.errors import InputError

LISTED = 200


def list_runs(root: Path) -> tuple[RunFolder, ...]:
    """Run folders directly under a folder, the newest first."""
    try:
        found = [path for path in root.iterdir() if path.is_dir() and is_run(path)]
    except OSError:
        return ()
    return tuple(RunFolder(path.resolve()) for path in sorted(found, key=_changed, reverse=True)[:LISTED])


def short_state(folder: RunFolder) -> tuple[str, str]:
    """State and a few words."""
    try:
        found = status(folder.path)
    except InputError:
        return "unknown", ""
    return found.state, "" if found.state == "created" else f"step {found.step}"


def goes_on(folder: RunFolder) -> bool:
    """Whether the run is alive."""
    return is_alive(folder)


def age(folder: RunFolder) -> str:
    """When the run last said something."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(_changed(folder.path)))


def _changed(path: Path) -> float:
    for name in ("events.jsonl", "job.json"):
        try:
            return (path / name).stat().st_mtime
        except OSError:
            continue
    return 0.0
