"""Memory against speed: a point a setup, the card's limit as a line, the one that the cursor is on marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.text import GIB
from launcher.tui.themes import Colours, colours
from planner.answers.plan import FrontierPoint

HEIGHT = 8
LEAST_COLUMNS = 50
"""Below, the list alone says it."""
_LABEL = 8


@dataclass(frozen=True, slots=True)
class Frontier:
    """What is drawn: points by rising memory, what the card leaves, and which point is marked."""

    points: tuple[FrontierPoint, ...] = ()
    usable_bytes: int = 0
    marked: int | None = None


class FrontierPlot(Widget):
    """Shows Frontier over the whole widget."""

    DEFAULT_CSS = f"FrontierPlot {{ height: {HEIGHT}; display: none; }}"

    data: reactive[Frontier] = reactive(Frontier())

    def render(self) -> Text:
        """Draw axes and points."""
        return draw(self.data, self.content_size.width, colours(self.app))


def draw(data: Frontier, width: int, shown: Colours) -> Text:
    """The plot as text of HEIGHT lines: tokens a second upwards, GiB to the right."""
    columns, rows = width - _LABEL - 1, HEIGHT - 1
    if len(data.points) < 2 or columns < 10:
        return Text("")
    memory = [point.peak_upper_bytes for point in data.points]
    rates = [point.tokens_per_second for point in data.points]
    right = max(*memory, data.usable_bytes)
    cells = _cells(data, columns, rows, right, shown)
    limit = _place(data.usable_bytes, min(memory), right, columns)
    text = Text(no_wrap=True)
    for row in range(rows):
        label = f"{max(rates):,.0f}" if row == 0 else f"{min(rates):,.0f}" if row == rows - 1 else ""
        text.append(label.rjust(_LABEL) + "│", shown.muted)
        for column in range(columns):
            character, colour = cells.get((column, row), ("┊", shown.error) if column == limit else (" ", ""))
            text.append(character, colour)
        text.append("\n")
    text.append(" " * _LABEL + "└" + _below(min(memory), right, data.usable_bytes, columns), shown.muted)
    return text


def _cells(
    data: Frontier, columns: int, rows: int, right: int, shown: Colours
) -> dict[tuple[int, int], tuple[str, str]]:
    """What stands in which cell; of points in one, the marked one, else the last."""
    left = min(point.peak_upper_bytes for point in data.points)
    low, high = (pick(point.tokens_per_second for point in data.points) for pick in (min, max))
    found: dict[tuple[int, int], tuple[str, str]] = {}
    order: Sequence[int] = [index for index in range(len(data.points)) if index != data.marked]
    for index in (*order, *([data.marked] if data.marked is not None else [])):
        point = data.points[index]
        row = rows - 1 - _place(point.tokens_per_second, low, high, rows)
        column = _place(point.peak_upper_bytes, left, right, columns)
        sign = (
            "◆"
            if index == data.marked
            else "★"
            if point.chosen and point.fits
            else "●"
            if point.fits
            else "✘"
        )
        colour = shown.primary if index == data.marked else shown.success if point.fits else shown.error
        found[column, row] = sign, colour
    return found


def _place(value: float, low: float, high: float, cells: int) -> int:
    share = 0.0 if high <= low else (value - low) / (high - low)
    return min(cells - 1, max(0, round(share * (cells - 1))))


def _below(left: int, right: int, usable: int, columns: int) -> str:
    """Least and most memory at the ends, the card's limit below its line where there is room."""
    line = ["─"] * columns
    first, last = f"{left / GIB:.1f}", f"{right / GIB:.1f} GiB"
    line[: len(first)], line[columns - len(last) :] = first, last
    label = f" ┊ {usable / GIB:.1f} usable "
    at = _place(usable, left, right, columns) - 1
    if len(first) < at and at + len(label) < columns - len(last):
        line[at : at + len(label)] = label
    return "".join(line)
