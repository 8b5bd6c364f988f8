"""Where runs are, by option or in the person's data folder, and what a run may be called."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from launcher.runs.folder import RunFolder, check_name, default_root
from launcher.runs.state import is_run, status
from launcher.tui.text import plain
from planner.base.errors import InputError, UnknownNameError

_SHOWN = 10
"""Names of runs that a message lists at most, the latest."""


def add_runs_option(parser: argparse.ArgumentParser) -> None:
    """Declare --runs."""
    parser.add_argument(
        "--runs",
        type=Path,
        help="where run folders are (default: the setting, else runs in your data folder)",
    )


def runs_root(asked: Path | None) -> Path:
    """The folder that --runs names, else the person's own.

    Raises:
        InputError: the settings cannot be read.
    """
    return default_root() if asked is None else asked.expanduser()


def run_name(text: str) -> str:
    """Parse an argument that names a run."""
    try:
        return check_name(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_folders(root: Path) -> list[Path]:
    """Run folders directly under a folder, by name; a folder that cannot be read has none."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and is_run(path))
    except OSError:
        return []


def named_run(root: Path, name: str) -> RunFolder:
    """The folder of a run.

    Raises:
        InputError: a name that no run can have.
        UnknownNameError: no run there has that name; the message tells those that are.
    """
    path = root / check_name(name)
    if path.is_dir() and is_run(path):
        return RunFolder(path.resolve())
    names = [plain(one.name, 100) for one in run_folders(root)]
    where = f"in {root.resolve()}; --runs names another folder"
    hint = f"(the runs {where}: {', '.join(names[-_SHOWN:])})" if names else f"(none are {where})"
    raise UnknownNameError("run", name, names, hint)


def refuse_taken(root: Path, name: str) -> None:
    """Say at once, and not after planning, that a name is taken and by what.

    Raises:
        InputError: a run of that name is there, or anything else.
    """
    path = root / name
    if not path.exists():
        return
    if not path.is_dir() or not is_run(path):
        raise InputError(f"{path}: this exists already and is no run; choose another --name")
    found = status(path)
    whose = f"{found.state}, process {found.pid}" if found.pid is not None else found.state
    raise InputError(f"{path}: the run folder exists already ({whose}); choose another --name")


def command_for(action: str, folder: RunFolder) -> str:
    """The command line that does something with a run."""
    path = folder.shown
    root = path.parent
    place = [] if root == default_root().resolve() else ["--runs", str(root)]
    return shlex.join(["vramwise", "runs", action, path.name, *place])
