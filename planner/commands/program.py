"""How commands run: parsing, one line an error, exit codes, closed pipes, Ctrl-C. The only owner of stderr.

A command is a module with `add_arguments(parser)` and `run(args) -> int`, imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from planner.base.errors import ExitCode, InputError, UnknownNameError, VramwiseError
from planner.base.values import dataclass

_OPTION = re.compile(r"-[-A-Za-z]")
"""How an option begins; a number below zero does not."""
GARBAGE_THRESHOLD = 100_000
"""Objects made after which the interpreter looks for those that only hold each other: some 20 MB of them."""


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives, what it is for, and values that it is given beside the parsed ones."""

    module: str
    help: str
    defaults: tuple[tuple[str, Any], ...] = ()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors: no usage dump, no exit, no guessed abbreviations."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse, and say of an option that there is none of which one may be meant.

        Raises:
            InputError: an argument is not accepted, or there is no such option.
        """
        given = sys.argv[1:] if args is None else args
        # First of all: the value of an option that there is none of would be taken for one by position.
        for one in given[: given.index("--")] if "--" in given else given:
            name = one.partition("=")[0]
            if _OPTION.match(one) and name not in self._option_string_actions:
                self._refuse(name)
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        found, unknown = parse(given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def _refuse(self, option: str) -> NoReturn:
        known = [
            name for name in self._option_string_actions if not name.startswith(("--no-", "--help", "-h"))
        ]
        words = option.strip("-").lower()
        parts = [name for name in known if len(words) > 1 and words in name]
        raise UnknownNameError("option", option, known, f"(see {self.prog} --help)", parts[:3])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of the choices, with the one that may be meant."""
        choices = action.choices
        if choices is not None and value not in choices:
            name = "/".join(action.option_strings) or str(action.metavar or action.dest)
            words = [str(choice) for choice in choices]
            raise UnknownNameError(f"value of {name}", str(value), words, f"(one of {', '.join(words)})")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise InputError(message)


class StoreOnce(argparse.Action):
    """Store a value; the same option twice is a contradiction, not a correction."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value, once; what may be left out by position may be given as an option."""
        if values is None:
            return
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, "given twice")
        setattr(namespace, self.dest, values)


class Version(argparse.Action):
    """Print the version and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, whatever else was given."""
        print(_version())
        parser.exit()


class SwitchOnce(argparse.BooleanOptionalAction):
    """--name and --no-name; both, or one twice, is a contradiction."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the switch's position, once."""
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, "given twice")
        super().__call__(parser, namespace, values, option_string)


def whole_number(text: str) -> int:
    """Parse an argument that is a whole number in plain digits."""
    digits = text[1:] if text[:1] in "+-" else text
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a whole number")
    return int(text)


def real_number(text: str) -> float:
    """Parse an argument that is a number; its bounds are checked by whoever takes it."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a number") from error


def run_commands(program: str, description: str, commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    """Run the command that the first argument names.

    Raises:
        InputError: no such command, or arguments that it does not take.
    """
    if argv and argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if argv and argv[0] in commands:
        return run_command(f"{program} {argv[0]}", commands[argv[0]], argv[1:])
    parser = Parser(prog=program, description=description)
    parser.add_argument("--version", action=Version, help="print the version and exit")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in commands.items():
        listed.add_parser(name, help=command.help, add_help=False)
    if argv and not argv[0].startswith("-"):
        hint = f"(see {program} --help)"
        close = difflib.get_close_matches(argv[0], commands, n=1)
        raise UnknownNameError("command", argv[0], (), hint, close)
    parser.parse_args(list(argv))
    parser.print_help()
    return ExitCode.OK


def run_command(program: str, command: Command, argv: Sequence[str]) -> int:
    """Import one command, parse its arguments and run it.

    Raises:
        InputError: arguments that it does not take.
    """
    module = importlib.import_module(command.module)
    parser = Parser(prog=program, usage="%(prog)s [OPTIONS]")
    declare(parser, command)
    parser.set_defaults(**dict(command.defaults))
    run: Callable[[argparse.Namespace], int] = module.run
    return run(parser.parse_args([_with_dashes(argument) for argument in argv]))


def declare(parser: argparse.ArgumentParser, command: Command) -> None:
    """Give a parser what a command says of itself and takes."""
    module = importlib.import_module(command.module)
    parser.description = " ".join((module.__doc__ or "").split())
    module.add_arguments(parser)
    parser.add_argument("--version", action=Version, help="print the version and exit")


def guarded(program: str, run: Callable[[], int]) -> int:
    """Run a program: its errors become a line on stderr and an exit code; the unexpected is shown whole."""
    try:
        code = int(run())
        sys.stdout.flush()
    except VramwiseError as error:
        _flush_quietly()
        print(f"{program}: {_one_line(str(error))}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        _flush_quietly()
        print(f"{program}: interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        _discard_stdout()
        return int(ExitCode.OK)
    return code


def run_as_program(program: str, run: Callable[[], int]) -> NoReturn:
    """Run with stdout made safe for any encoding, and exit."""
    # What a command makes stays: looking for circles in it takes a tenth of the time.
    gc.set_threshold(GARBAGE_THRESHOLD)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(guarded(program, run))


def say(message: str) -> None:
    """Talk to the person: one line on stderr."""
    print(_one_line(message), file=sys.stderr, flush=True)


def progress(what: str) -> Callable[[int, int], None]:
    """What is told how many of how many are done: a line on stderr that goes away with the last of them.
    Where stderr is no terminal nothing is shown.
    """
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        line = f"\r{what}: {done} of {total}" if done < total else "\r\x1b[K"
        print(line, end="", file=sys.stderr, flush=True)

    return show


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"vramwise {version('vramwise')}"
    except PackageNotFoundError:
        return "vramwise, from a source tree that is not installed"


def _with_dashes(argument: str) -> str:
    """Option names may be spelt as TRL spells them: --max_length is --max-length."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _one_line(message: str) -> str:
    joined = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


def _shown(text: str) -> str:
    from planner.base.errors import shorten

    return shorten(text)


def _flush_quietly() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush cannot fail on the closed pipe."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
