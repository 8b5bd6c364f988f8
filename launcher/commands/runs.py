"""List the runs of a folder, follow one, or stop one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from planner.base.errors import ExitCode, InputError, UnknownNameError
from planner.commands.program import say

_SHOWN = 10
"""Names of runs that a message lists at most, the latest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("action", nargs="?", choices=("list", "follow", "stop"), default="list")
    parser.add_argument("run", nargs="?", help="name of a run folder (follow, stop)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (runs)")
    parser.add_argument("--json", action="store_true", help="list as JSON")


def run(args: argparse.Namespace) -> int:
    """List, follow or stop.

    Raises:
        InputError: no such run.
    """
    root: Path = args.runs.expanduser()
    if args.action == "list":
        if args.run is not None:
            raise InputError("list takes no run")
        return _list(root, as_json=args.json)
    if args.run is None:
        raise InputError(f"runs {args.action} needs the name of a run folder")
    path = _named(root, args.run)
    return _follow(path) if args.action == "follow" else _stop(path)


def _folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/job.json"))


def _named(root: Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        UnknownNameError: no run there has that name; the message tells those that are.
    """
    if (root / name / "job.json").is_file():
        return root / name
    names = [path.name for path in _folders(root)]
    where = f"in {root.resolve()}; --runs names another folder"
    hint = f"(the runs {where}: {', '.join(names[-_SHOWN:])})" if names else f"(none are {where})"
    raise UnknownNameError("run", name, names, hint)


def _list(root: Path, *, as_json: bool) -> int:
    from launcher.runs import supervisor

    found = [(path, supervisor.status(path)) for path in _folders(root)]
    if as_json:
        rows = [
            {"run": path.name, "state": one.state, "step": one.step, "total_steps": one.total_steps}
            for path, one in found
        ]
        json.dump({"version": 1, "runs": rows}, sys.stdout, indent=2)
        print()
        return ExitCode.OK
    if not found:
        say(f"no runs in {root.resolve()}: they stay where they are started (--runs names another folder)")
        return ExitCode.OK
    from planner.text.figures import columns, show

    table = [
        [path.name, one.state, f"{one.step}/{'?' if one.total_steps is None else one.total_steps}"]
        for path, one in found
    ]
    heads = [("run", "name"), ("state", "name"), ("step", "number")]
    show(lambda out: columns(out, heads, table, indent=0))
    return ExitCode.OK


def _follow(path: Path) -> int:
    from launcher.commands.follow import finish, follow_run
    from launcher.runs import supervisor
    from launcher.runs.folder import RunFolder

    folder = RunFolder(path.resolve())
    if supervisor.status(folder.path).state == "created":
        raise InputError(f"{path}: this run has not been started")
    interrupted = follow_run(folder, still_running=lambda: supervisor.status(folder.path).alive)
    return finish(
        folder,
        supervisor.status(folder.path),
        interrupted=interrupted,
        out=sys.stdout,
        store=False,
    )


def _stop(path: Path) -> int:
    from launcher.runs import supervisor

    status = supervisor.status(path)
    if not status.alive:
        raise InputError(f"{path}: this run is not running ({status.state})")
    supervisor.request_stop(path)
    say(f"{path.name} stops after its current step and saves")
    return ExitCode.OK
