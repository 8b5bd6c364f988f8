"""List runs, show all of one, follow it, stop it, go on with one that has ended, or delete it.

Ctrl-C in `runs follow` leaves the view; the run goes on. When the followed run ends, the exit code is that of
its end (docs/reliability.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.commands import resume, runs_list
from launcher.commands.runs_folder import add_runs_option, named_run, run_folders, runs_root
from launcher.runs import supervisor
from launcher.runs.folder import RunFolder
from launcher.runs.minding import removal, stopping
from launcher.tui.text import plain
from planner.base.errors import ExitCode, InputError
from planner.commands.program import say

_PREVIOUS_ROOT = Path("runs")
"""A folder of runs beside the person, where --runs=runs may have been meant."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("action", nargs="?", choices=("list", *_ACTIONS), default="list")
    parser.add_argument("run", nargs="?", metavar="NAME", help="name of a run (all actions but list)")
    add_runs_option(parser)
    parser.add_argument("--json", action="store_true", help="list or show as JSON")
    parser.add_argument("--now", action="store_true", help="stop at once, keeping what is saved already")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    resume.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        InputError: no such run, or one that this cannot be done with.
    """
    root = runs_root(args.runs)
    if args.action != "resume":
        resume.refuse_arguments(args)
    if args.action == "list":
        if args.run is not None:
            raise InputError("list takes no run")
        return _list(root, as_json=args.json)
    if args.run is None:
        raise InputError(f"runs {args.action} needs the name of a run")
    return _ACTIONS[args.action](named_run(root, args.run), args)


def _list(root: Path, *, as_json: bool) -> int:
    found = [(path.name, supervisor.status(path)) for path in run_folders(root)]
    if as_json:
        rows = [runs_list.as_json(name, one) for name, one in found]
        json.dump({"version": 1, "runs": rows}, sys.stdout, indent=2)
        print()
    elif found:
        runs_list.print_table(found)
    else:
        here = _PREVIOUS_ROOT.resolve()
        others = len(run_folders(_PREVIOUS_ROOT)) if here != root.resolve() else 0
        there = f"; {others} are in {here} (--runs runs)" if others else " (--runs names another folder)"
        say(f"no runs in {root.resolve()}{there}")
    return ExitCode.OK


def _show(folder: RunFolder, args: argparse.Namespace) -> int:
    if args.json:
        json.dump(runs_list.facts(folder), sys.stdout, indent=2)
        print()
    else:
        runs_list.print_facts(folder)
    return ExitCode.OK


def _follow(folder: RunFolder, args: argparse.Namespace) -> int:
    from launcher.commands.follow import finish, follow_to_the_end
    from launcher.commands.interrupts import Interrupts
    from launcher.runs.locks import is_alive

    if supervisor.status(folder.path).state == "created":
        raise InputError(f"{folder.path}: this run has not been started")
    with Interrupts() as interrupts:
        folder, left = follow_to_the_end(folder, interrupts, is_alive, ends_run=False)
    if left is not None:
        return 128 + left
    status = supervisor.status(folder.path)
    return finish(folder, status, out=sys.stdout, store=False)


def _stop(folder: RunFolder, args: argparse.Namespace) -> int:
    status = supervisor.status(folder.path)
    if not status.alive:
        raise InputError(f"{folder.path}: this run is not running ({status.state})")
    if args.now:
        supervisor.kill(folder.path)
        status = supervisor.status(folder.path)
        if status.alive:
            say(f"{folder.path.name} cannot be ended (process {status.pid}); see {folder.log('keeper')}")
            return ExitCode.FAILED
        say(f"{folder.path.name} was ended: {status.message or status.state}")
        return ExitCode.OK
    stopping.ask(folder, stopping.AFTER_STEP)
    say(f"{folder.path.name} stops after its current step and saves")
    return ExitCode.OK


def _delete(folder: RunFolder, args: argparse.Namespace) -> int:
    """Remove a run that is not alive, at once for everybody who lists runs.

    Raises:
        InputError: the run is alive or just being started, or nobody has said yes.
    """
    removal.refuse_alive(folder)
    status = supervisor.status(folder.path)
    name = plain(folder.path.name, 100)
    if not args.yes:
        if not sys.stdin.isatty():
            raise InputError(f"delete asks before it removes {folder.path}; --yes answers for scripts")
        print(
            f"delete {name} ({status.state}, step {status.step:,}) for ever? [y/N] ", end="", file=sys.stderr
        )
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing was deleted")
            return ExitCode.OK
    removal.remove(folder)
    say(f"{name} is deleted")
    return ExitCode.OK


_ACTIONS: dict[str, Callable[[RunFolder, argparse.Namespace], int]] = {
    "show": _show,
    "follow": _follow,
    "stop": _stop,
    "resume": lambda folder, args: resume.run(folder.path, args),
    "delete": _delete,
}
