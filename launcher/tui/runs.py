"""Run folders under a folder."""

from __future__ import annotations

from pathlib import Path

from launcher.runs.folder import RunFolder
from launcher.runs.locks import is_alive
from launcher.runs.state import is_run

LISTED = 200


def list_runs(root: Path) -> tuple[RunFolder, ...]:
    """Run folders directly under a folder, the newest first."""
    try:
        found = [path for path in root.iterdir() if path.is_dir() and is_run(path)]
    except OSError:
        return ()
    return tuple(RunFolder(path.resolve()) for path in sorted(found, key=_changed, reverse=True)[:LISTED])


def goes_on(folder: RunFolder) -> bool:
    """Whether the run is alive."""
    return is_alive(folder)


def _changed(path: Path) -> float:
    for name in ("events.jsonl", "job.json"):
        try:
            return (path / name).stat().st_mtime
        except OSError:
            continue
    return 0.0
