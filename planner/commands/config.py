"""Settings that commands and the terminal interface take where they are not told.

They are in one TOML file, whose path `config path` prints.
"""

from __future__ import annotations

import argparse

from planner.base.errors import ExitCode, InputError
from planner.base.settings import HELP, NAMES, change_setting, load_settings, parse_setting, settings_path

ACTIONS = ("list", "get", "set", "unset", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
    parser.add_argument("name", nargs="?", help="; ".join(f"{name}: {HELP[name]}" for name in NAMES))
    parser.add_argument("value", nargs="?", help="for set")


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        InputError: a name or value that is not accepted, or a file that holds no settings.
    """
    wanted = {"list": 0, "path": 0, "get": 1, "unset": 1, "set": 2}[args.action]
    given = sum(one is not None for one in (args.name, args.value))
    if given != wanted:
        takes = ("no name", "a name", "a name and a value")[wanted]
        raise InputError(f"config {args.action} takes {takes}")
    if args.action == "path":
        print(settings_path())
    elif args.action == "set":
        value = parse_setting(args.name, args.value)
        if args.name == "gpu":
            _check_gpu(args.value)
        change_setting(args.name, value)
    elif args.action == "unset":
        change_setting(args.name, None)
    elif args.action == "get":
        return _get(args.name)
    else:
        _list()
    return ExitCode.OK


def _get(name: str) -> int:
    """Print the value of a setting; exit code 1 without one."""
    kept = load_settings()
    if name not in NAMES:
        parse_setting(name, "")
    value = getattr(kept, name)
    if value is None:
        return ExitCode.FAILED
    print(_shown(value))
    return ExitCode.OK


def _list() -> None:
    from planner.text.figures import pairs, show

    kept = load_settings()
    rows = [(name, _shown(getattr(kept, name))) for name in NAMES]
    show(lambda out: pairs(out, rows))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_gpu(text: str) -> None:
    """See that a card is one, before it is kept."""
    from planner.gpus.parse import parse_gpu

    parse_gpu(text)
