"""Run folders to pick from."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.runs.events import EndEvent, LogEvent, from_line
from launcher.runs.folder import RunFolder
from launcher.runs.supervisor import live_pid
from launcher.tui.tail import last_lines
from planner.base.errors import MissingExtraError

LISTED = 200


def list_runs(root: Path) -> tuple[RunFolder, ...]:
    """Run folders directly under a folder, the newest first."""
    try:
        found = [path for path in root.iterdir() if (path / "job.json").is_file()]
    except OSError:
        return ()
    return tuple(RunFolder(path.resolve()) for path in sorted(found, key=_changed, reverse=True)[:LISTED])


def short_state(folder: RunFolder) -> tuple[str, str]:
    """State and a few words, from the end of the event file."""
    step = 0
    for line in reversed(last_lines(folder.events, 20)):
        event = from_line(line)
        if isinstance(event, EndEvent):
            return str(event.state), f"step {event.step}"
        if isinstance(event, LogEvent):
            step = event.step
            break
    try:
        alive = live_pid(folder, "trainer") is not None
    except MissingExtraError:
        return "unknown", f"step {step}"
    if alive:
        return "running", f"step {step}"
    return ("killed", f"step {step}") if folder.identity("trainer").exists() else ("created", "")


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
