"""A small line plot in braille dots, with its range on the left and below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.text import number
from launcher.tui.themes import colours

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_LABEL_WIDTH = 8
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class PlotData:
    """Points by rising x; `marks` are single points drawn over the line. `second` is another line in another
    colour, `apart` with its own scale, which no label tells. A `faint` first line stands behind it.
    """

    points: Points = ()
    marks: Points = ()
    x_label: str = ""
    end: float | None = None
    second: Points = ()
    apart: bool = False
    faint: bool = False


class LinePlot(Widget):
    """Shows PlotData over the whole widget."""

    DEFAULT_CSS = "LinePlot { height: 1fr; min-height: 4; }"

    data: reactive[PlotData] = reactive(PlotData())

    def render(self) -> Text:
        """Draw axis labels and dots."""
        shown = colours(self.app)
        return draw(
            self.data,
            self.content_size.width,
            self.content_size.height,
            line=shown.muted if self.data.faint else shown.primary,
            second=shown.primary if self.data.faint else shown.accent,
            mark=shown.warning,
            muted=shown.muted,
        )


def draw(
    data: PlotData, width: int, height: int, *, line: str, mark: str, muted: str, second: str = ""
) -> Text:
    """The plot as text of `height` lines."""
    columns, rows = width - _LABEL_WIDTH - 1, height - 1
    together = data.points + data.marks + (() if data.apart else data.second)
    finite = [p for p in together if math.isfinite(p[0]) and math.isfinite(p[1])]
    if columns < 4 or rows < 1 or not finite:
        return Text("waiting for the first step" if columns >= 4 else "", muted)
    frame = _frame(finite, columns, rows, data.end)
    cells = _line_cells([p for p in data.points if p in frame], frame)
    others = [p for p in data.second if p in frame]
    over = _line_cells(others, _frame(others, columns, rows, data.end) if data.apart and others else frame)
    marks = {(frame.column(x) // 2, frame.row(y) // 4) for x, y in data.marks if (x, y) in frame}
    text = Text(no_wrap=True, end="")
    for row in range(rows):
        text.append(_row_label(row, rows, frame.low, frame.high).rjust(_LABEL_WIDTH) + "│", muted)
        for column in range(columns):
            here = column, row
            if here in marks:
                text.append("●", mark)
            else:
                # A cell has one colour; dots of both are kept.
                bits = cells.get(here, 0) | over.get(here, 0)
                text.append(chr(0x2800 + bits) if bits else " ", second if here in over else line)
        text.append("\n")
    text.append(" " * _LABEL_WIDTH + "└" + _x_labels(frame, columns, data.x_label), muted)
    return text


def _frame(points: Sequence[tuple[float, float]], columns: int, rows: int, end: float | None) -> _Frame:
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    return _Frame(
        columns=columns,
        rows=rows,
        first=first,
        last=max(last, end or last),
        low=min(y for _, y in points),
        high=max(y for _, y in points),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """Maps values to dots."""

    columns: int
    rows: int
    first: float
    last: float
    low: float
    high: float

    def __contains__(self, point: object) -> bool:
        return isinstance(point, tuple) and all(math.isfinite(v) for v in point)

    def column(self, x: float) -> int:
        span = self.last - self.first
        return (
            0
            if span <= 0
            else min(2 * self.columns - 1, int((x - self.first) / span * (2 * self.columns - 1)))
        )

    def row(self, y: float) -> int:
        span = self.high - self.low
        share = 0.5 if span <= 0 else (self.high - y) / span
        return min(4 * self.rows - 1, max(0, round(share * (4 * self.rows - 1))))


def _line_cells(points: Sequence[tuple[float, float]], frame: _Frame) -> dict[tuple[int, int], int]:
    cells: dict[tuple[int, int], int] = {}

    def dot(column: int, row: int) -> None:
        key = (column // 2, row // 4)
        cells[key] = cells.get(key, 0) | _DOTS[row % 4][column % 2]

    previous: tuple[int, int] | None = None
    for x, y in points:
        here = (frame.column(x), frame.row(y))
        for column, row in _between(previous or here, here):
            dot(column, row)
        previous = here
    return cells


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / steps), round(start[1] + (end[1] - start[1]) * i / steps))
        for i in range(steps + 1)
    ]


def _row_label(row: int, rows: int, low: float, high: float) -> str:
    if low == high:
        # A single value is drawn in the middle.
        return number(high) if row == rows // 2 else ""
    if row == 0:
        return number(high)
    if row == rows - 1:
        return number(low)
    return number((low + high) / 2) if rows >= 5 and row == rows // 2 else ""


def _x_labels(frame: _Frame, columns: int, label: str) -> str:
    left, right = f"{frame.first:,.0f}", f"{frame.last:,.0f}"
    middle = label if len(left) + len(right) + len(label) + 4 <= columns else ""
    gap = columns - len(left) - len(right)
    return (
        left + (f" {middle} " if middle else "").center(gap, "─") + right if gap > 0 else right.rjust(columns)
    )
