"""Lines of text of which only those in sight are drawn, however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.cells import chop_cells
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

Line = tuple[tuple[str, str], ...]
"""Pieces of text, each with its style: a colour, bold, or nothing. Without control characters."""


class LogLines(ScrollView, can_focus=True):
    """Long lines are broken at the width. A Static would lay all lines out anew at each that comes."""

    DEFAULT_CSS = "LogLines { overflow-x: hidden; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - as Textual has it
        super().__init__(id=id)
        self._lines: list[Line] = []
        self._rows: list[Line] = []
        self._width = 0
        self._stays_at_end = True

    @property
    def text(self) -> str:
        """All lines, as they are before they are broken."""
        return "\n".join("".join(piece for piece, _ in line) for line in self._lines)

    @property
    def at_end(self) -> bool:
        """Whether the last line is in sight."""
        return self.max_scroll_y - self.scroll_y <= 1

    def show(self, lines: Iterable[Line], *, end: bool = False) -> None:
        """Show these lines: their last where the last was in sight, or where `end` is wanted."""
        self._stays_at_end = end or not self._width or self.at_end
        self._lines = list(lines)
        self._break()
        self._go_to_end()

    def _go_to_end(self) -> None:
        if self._stays_at_end:
            self.scroll_to(y=self.max_scroll_y, animate=False, force=True, immediate=True)

    def on_resize(self) -> None:
        """Break the lines anew at another width, and stay at the end."""
        if self.scrollable_content_region.width != self._width:
            self._break()
        self._go_to_end()

    def _break(self) -> None:
        self._width = self.scrollable_content_region.width
        width = max(1, self._width)
        self._rows = [row for line in self._lines for row in broken(line, width)]
        self.virtual_size = Size(self._width, len(self._rows))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """A row in sight."""
        at, own = self.scroll_offset.y + y, self.rich_style
        row = self._rows[at] if at < len(self._rows) else ()
        pieces = [Segment(text, own + Style.parse(style) if style else own) for text, style in row]
        return Strip(pieces).adjust_cell_length(self.size.width, own)


def broken(line: Line, width: int) -> Iterator[Line]:
    """The rows of at most `width` cells that a line is broken into; an empty line is one."""
    if sum(len(text) for text, _ in line) <= width and all(text.isascii() for text, _ in line):
        yield line
        return
    row: list[tuple[str, str]] = []
    room = width
    for text, style in line:
        rest = text
        while rest:
            first = chop_cells(rest, room)[0] if room else ""
            if first:
                row.append((first, style))
            rest, room = rest[len(first) :], 0
            if rest:
                yield tuple(row)
                row, room = [], width
        room = width - sum(map(_cells, row))
    yield tuple(row)


def _cells(piece: tuple[str, str]) -> int:
    return Strip([Segment(piece[0])]).cell_length
