"""Every error a person can meet, and the exit codes of the commands.

A command turns one of these into a single line on stderr and the exit code; other errors show themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes that scripts may rely on."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    DOES_NOT_FIT = 3
    INTERRUPTED = 130


class VramwiseError(Exception):
    """Base of all errors with a message meant for the person; the message is one line."""

    exit_code = ExitCode.FAILED

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it is: what a class makes its message of is not kept."""
        return _as_it_was, (type(self), self.args), self.__dict__


def _as_it_was(kind: type[VramwiseError], args: tuple[object, ...]) -> VramwiseError:
    return kind.__new__(kind, *args)


class InputError(VramwiseError):
    """What was asked is malformed, contradictory or unknown."""

    exit_code = ExitCode.BAD_INPUT


class FieldError(InputError):
    """A field has a value outside what is accepted."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        self.field = field
        self.value = value
        self.accepted = accepted
        super().__init__(f"{field}: {shorten(value)} is not accepted; expected {accepted}")


class NotModelledError(InputError):
    """A knob of the contract whose memory is not modelled; refused rather than ignored."""

    def __init__(self, field: str, value: object) -> None:
        self.field = field
        super().__init__(f"{field}={shorten(value)}: its memory is not modelled yet, so no number is given")


class UnknownNameError(InputError):
    """A name that is not known: of a model, GPU, command or option.

    `meant` are those that may be meant by it; without them those of `known` that are written nearly so.
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], hint: str, meant: Sequence[str] = ()
    ) -> None:
        self.name = name
        close = meant or difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.6)
        suggestion = f"; did you mean {', '.join(close)}?" if close else ""
        super().__init__(f"unknown {kind} {shorten(name)}{suggestion} {hint}".rstrip())


class MissingExtraError(VramwiseError):
    """Something needs packages that are not installed: those of the training stack, or as `install` says."""

    def __init__(self, what: str, missing: str, install: str = "'vramwise[train]'") -> None:
        super().__init__(f"{what} needs {missing}; install it with: pip install {install}")


def shorten(value: object, limit: int = 60) -> str:
    """Show a value on one line, escaped and cut, so that input cannot flood or restyle the terminal."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
