"""Pages that are written without rich say what rich would."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from planner.text.figures import bullets, footnote, heading, pairs, say, show, show_page
from planner.text.page import STYLES, NeedsRichError, Page

if TYPE_CHECKING:
    from planner.text.figures import Out

WORDS = st.text("ab, .-█▏", max_size=70)


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def everything(parts: list[tuple[str, str]]) -> Callable[[Out], None]:
    def write(out: Out) -> None:
        say(out, "begins ", *parts)
        heading(out, "A heading")
        pairs(out, [(text.strip()[:9], text) for text, _ in parts])
        bullets(out, [text for text, _ in parts])
        footnote(out, "  a remark " + "of some length " * 5)

    return write


@given(
    st.lists(st.tuples(WORDS, st.sampled_from(["", *STYLES])), max_size=4),
    st.integers(20, 100),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_page_is_what_rich_writes(parts: list[tuple[str, str]], width: int, styled: bool) -> None:
    """But for blanks at the ends of lines, which are not printed."""
    page = Page(width=width, encoding="utf-8", styled=styled)
    file = io.StringIO()
    out = Console(
        file=file,
        width=width,
        force_terminal=styled,
        color_system="standard" if styled else None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    everything(parts)(page)
    everything(parts)(out)
    ours, theirs = ([line.rstrip() for line in text.splitlines()] for text in (page.text, file.getvalue()))
    assert ours == theirs


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "told", [{}, {"COLUMNS": "61"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}], ids=str
)
def test_a_page_is_shown_as_rich_shows_it(
    told: dict[str, str], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **told}.items():
        monkeypatch.setenv(name, value)
    parts = [("FITS", "bold green"), (": a model ", ""), ("with a long name " * 6, "dim")]
    shown = []
    for way in (show, show_page):
        file = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stdout", file)
        way(everything(parts))
        shown.append(file.getvalue())
    assert shown[0] == shown[1]
    assert ("\x1b[" in shown[0]) == ((terminal or "FORCE_COLOR" in told) and told.get("TERM") != "dumb")


def test_what_a_page_cannot_write_rich_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(width=40, encoding="utf-8", styled=False)
    with pytest.raises(NeedsRichError):
        page.say("模型")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    show_page(lambda out: pairs(out, [("模型", "模" * 50), ("name", "ab")]))
    assert "模型" in file.getvalue()
    assert "name  ab" in file.getvalue()
