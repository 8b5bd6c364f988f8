"""Print what makes a shell complete commands, options and names: eval "$(vramwise completion bash)"."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from planner.base.errors import ExitCode
from planner.commands.program import Command, Parser, declare

SHELLS = ("bash", "zsh", "fish", "tcsh")
_PLAN = "plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.usage = "%(prog)s SHELL"
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script: of the program with its commands, and of `plan`, which is a program too."""
    import shtab

    commands: Callable[[], Mapping[str, Command]] = args.commands
    found = commands()
    for parser in (_program(args.program, found), _alone(_PLAN, found[_PLAN])):
        print(shtab.complete(parser, shell=args.shell))
    return ExitCode.OK


def _program(name: str, commands: Mapping[str, Command]) -> Parser:
    parser = Parser(prog=name)
    listed = parser.add_subparsers(dest="command")
    for word, command in commands.items():
        _declare(listed.add_parser(word, help=command.help), command)
    return parser


def _alone(name: str, command: Command) -> Parser:
    parser = Parser(prog=name)
    _declare(parser, command)
    return parser


def _declare(parser: argparse.ArgumentParser, command: Command) -> None:
    """What a command takes, with the names that models and GPUs have and the files that options want."""
    import shtab

    from planner.gpus.catalog import gpu_catalog
    from planner.gpus.parse import REFERENCE_CARDS
    from planner.models.catalog import catalog_ids

    names = {
        "model": catalog_ids(),
        "gpu": (*(gpu.id for gpu in gpu_catalog()), *(f"{size}GB" for size in REFERENCE_CARDS)),
    }
    declare(parser, command)
    for action in parser._actions:
        if action.dest in names and action.choices is None:
            action.choices = names[action.dest]
        elif action.dest in ("data", "eval_data", "setups"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in ("runs", "folder"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
