"""A page of plain lines, written without rich: what most people read takes a tenth less time then.

It writes what rich's console writes, to the byte (tests/unit/test_page.py), of text whose characters are one
cell wide, to files and to ordinary terminals. All else rich is to do.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import IO

Part = str | tuple[str, str]
"""Text, or text with a style of STYLES."""
STYLES = {"bold": "1", "dim": "2", "bold green": "1;32", "bold red": "1;31"}
_WORD = re.compile(r"\s*\S+\s*")
_NARROW = re.compile(r"[ -~▏▎▍▌▋▊▉█]*")
"""Text whose characters are one cell wide, without control characters."""
_TOLD = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "JUPYTER_COLUMNS", "JUPYTER_LINES")
"""Words of the environment on how to write, which rich knows to read."""
_DUMB = ("dumb", "unknown")


class NeedsRichError(Exception):
    """A page was asked for what it cannot write."""


class Page:
    """Lines of a width, in `written`; `styled` where codes of styles are to be in them."""

    def __init__(self, *, width: int, encoding: str, styled: bool) -> None:
        self.width, self.encoding, self._styled = width, encoding, styled
        self.written: list[str] = []

    @classmethod
    def of(cls, file: IO[str]) -> Page | None:
        """A page for a file or a terminal; None where rich has to find out what it can."""
        terminal = file.isatty()
        dumb = terminal and os.environ.get("TERM", "").lower() in _DUMB
        notebook = "IPython" in sys.modules or "idlelib" in sys.modules
        if sys.platform == "win32" or dumb or notebook or any(name in os.environ for name in _TOLD):
            return None
        encoding = (getattr(file, "encoding", None) or "utf-8").lower()
        return cls(width=_width(), encoding=encoding, styled=terminal)

    @property
    def text(self) -> str:
        """All lines."""
        return "".join(line + "\n" for line in self.written)

    def print(self) -> None:
        """An empty line."""
        self.written.append("")

    def say(self, *parts: Part, wraps: bool = True) -> None:
        """A line, or as many as it takes.

        Raises:
            NeedsRichError: text of other than narrow characters, or a style that is not known.
        """
        text, spans = "", []
        for part in parts:
            own, style = (part, "") if isinstance(part, str) else part
            if style and style not in STYLES:
                raise NeedsRichError
            spans.append((len(text), len(text) + len(own), style))
            text += own
        if not is_narrow(text):
            raise NeedsRichError
        for start, end in _cuts(text, self.width) if wraps else ((0, len(text)),):
            line = ""
            for first, last, style in spans:
                piece = text[max(first, start) : min(last, end)]
                if style and piece and self._styled:
                    piece = f"\x1b[{STYLES[style]}m{piece}\x1b[0m"
                line += piece
            self.written.append(line)


def is_narrow(text: str) -> bool:
    """Whether each of a text's characters is known to be one cell wide."""
    return _NARROW.fullmatch(text) is not None


def wrapped(text: str, width: int) -> list[str]:
    """A narrow text in lines of a width."""
    return [text[start:end] for start, end in _cuts(text, width)]


def _cuts(text: str, width: int) -> Iterator[tuple[int, int]]:
    """Where lines begin and end: words that fit no line are cut, and begin on a line of their own."""
    cuts, used = [0], 0
    for match in _WORD.finditer(text):
        word, start = match[0], match.start()
        needed = len(word.rstrip())
        if needed <= width - used:
            used += len(word)
        elif needed > width:
            cuts += [start + offset for offset in range(0, len(word), width) if start + offset]
            used = (len(word) - 1) % width + 1
        elif used and start:
            cuts.append(start)
            used = len(word)
    for start, end in pairwise([*cuts, len(text)]):
        # Blanks that lead beyond the width are left out.
        beyond = max(0, end - start - width)
        yield start, end - min(beyond, end - start - len(text[start:end].rstrip()))


def _width() -> int:
    """The terminal's width, or what COLUMNS says; 80 where neither is known."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit():
        return int(told) or 80
    for descriptor in (0, 1, 2):
        try:
            return os.get_terminal_size(descriptor).columns or 80
        except (ValueError, OSError):
            continue
    return 80
