"""A stacked bar of memory components against what a card leaves for training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.text import gib
from launcher.tui.themes import colours

_MINIMUM_WIDTH = 10
_HEIGHT = 3


@dataclass(frozen=True, slots=True)
class BarPart:
    """One stretch of the bar."""

    size_bytes: int
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BarData:
    """What the bar shows: parts from the left, then up to `upper_bytes` as uncertain, the limit marked.

    `held` says what of the card's memory others hold, in words.
    """

    parts: tuple[BarPart, ...]
    peak_bytes: int
    upper_bytes: int
    usable_bytes: int
    held: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes that all parts hold."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def scale_bytes(self) -> int:
        """Bytes at the right edge."""
        return max(1, self.usable_bytes, self.upper_bytes, self.total_bytes)


class MemoryBar(Widget):
    """Two rows of bar, where there is room, and one of scale."""

    DEFAULT_CSS = f"MemoryBar {{ height: {_HEIGHT}; }}"

    data: reactive[BarData | None] = reactive(None)

    def render(self) -> Text:
        """Draw the bar over the widget's width."""
        width = max(_MINIMUM_WIDTH, self.content_size.width)
        if self.data is None:
            return Text("")
        shown = colours(self.app)
        row = bar_row(self.data, width, uncertain=shown.muted, free=shown.panel, mark=shown.background)
        scale = scale_row(self.data, width, muted=shown.muted, beyond=shown.error)
        rows = [row] if self.content_size.height < _HEIGHT else [row, row.copy()]
        return Text("\n").join([*rows, scale])


def bar_row(data: BarData, width: int, *, uncertain: str, free: str, mark: str) -> Text:
    """One row, two colours a cell: each half cell takes the colour of the bytes at its middle.

    Equal cells are one stretch of text: a stretch for each cell took three times as long to paint.
    """
    halves = _half_cells(data, width)
    limit = limit_cell(data, width)
    held = max(data.upper_bytes, data.total_bytes)
    row = Text(no_wrap=True, end="")

    def drawn(cell: int) -> tuple[str, Style]:
        left, right = halves[2 * cell], halves[2 * cell + 1]
        if cell == limit and data.usable_bytes < data.scale_bytes:
            return "┃", Style(color=mark, bgcolor=left or free, bold=True)
        if left is None and right is None and (cell + 0.5) / width * data.scale_bytes <= held:
            return "▒", Style(color=uncertain, bgcolor=free)
        if left == right:
            return " ", Style(bgcolor=left or free)
        return "▌", Style(color=left or free, bgcolor=right or free)

    for (character, style), cells in groupby(drawn(cell) for cell in range(width)):
        row.append(character * len(list(cells)), style)
    return row


def limit_cell(data: BarData, width: int) -> int:
    """Cell in which the card's usable bytes end."""
    return min(width - 1, int(data.usable_bytes / data.scale_bytes * width))


def scale_row(data: BarData, width: int, *, muted: str, beyond: str) -> Text:
    """Marks under the bar: where the card ends, and by how much the need lies beyond it."""
    label = f"{gib(data.usable_bytes)} usable"
    limit = limit_cell(data, width)
    if data.held and len(data.held) + len(label) + 4 <= limit:
        label = f"{data.held}, {label}"
    row = Text(no_wrap=True, end="")
    if data.usable_bytes >= data.scale_bytes:
        row.append(f"{label} ▲".rjust(width), muted)
        return row
    over = f" up to {gib(data.upper_bytes)} needed"
    if limit >= len(label) + 1:
        row.append(f"{label} ▲".rjust(limit + 1), beyond)
    else:
        row.append(" " * limit + f"▲ {label}", beyond)
    if len(row.plain) + len(over) <= width:
        row.append(over.rjust(width - len(row.plain)), muted)
    return row


def _half_cells(data: BarData, width: int) -> list[str | None]:
    """The colour of each half cell; None beyond the last part."""
    found: list[str | None] = []
    end = 0
    for part in data.parts:
        end += part.size_bytes
        # Whole numbers: half cells whose middle, (i + 1/2) / (2 width) of the scale, lies before the end.
        reached = -((data.scale_bytes - 4 * width * end) // (2 * data.scale_bytes))
        found += [part.colour] * (reached - len(found))
    return found + [None] * (2 * width - len(found))
