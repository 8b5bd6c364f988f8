"""The data at the present setup: a histogram of lengths with the cut, and what a run over it comes to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.sizing import Sizing, WholeRun
from launcher.tui.text import plain
from launcher.tui.themes import Colours, colours
from launcher.tui.whole_run import run_lines
from planner.data.lengths import DatasetStats
from planner.text.figures import count

_LEVELS = " ▁▂▃▄▅▆▇█"
HEIGHT = 4
"""Lines of the histogram."""
_LABEL = 8
_WRAPPED = ("not used", "left out")
NO_DATA = "no data: d picks a file, and says how long a run over it takes and what it costs"


class DataPanel(Widget):
    """Counts, histogram, what is cut, padded and packed, steps, time and price."""

    DEFAULT_CSS = "DataPanel { height: auto; }"

    sizing: reactive[Sizing | None] = reactive(None)

    _laid_out: tuple[object, ...] | None = None

    def watch_sizing(self, new: Sizing | None) -> None:
        """Lay out anew only where there may be other lines; while a run is worked out those of the last one
        stand, since laying out takes as long as the answer to a key.
        """
        pending = new is not None and new.run is None and not new.no_run
        kind = _kind(new)
        if pending and self._laid_out is not None and self._laid_out[0] == kind[0]:
            return
        if kind != self._laid_out:
            self._laid_out = kind
            self.refresh(layout=True)

    def render(self) -> Text:
        """Draw the lines."""
        if self.sizing is None:
            return Text("")
        return data_text(self.sizing, max(24, self.content_size.width), colours(self.app))


def _kind(sizing: Sizing | None) -> tuple[object, ...]:
    if sizing is None or sizing.wishes.data is None:
        return (None,)
    run = sizing.run
    return sizing.wishes.data, sizing.no_run, () if run is None else run.data.notes, sizing.no_step


def data_text(sizing: Sizing, width: int, shown: Colours) -> Text:
    """The panel as text."""
    data = sizing.wishes.data
    if data is None:
        return Text(NO_DATA, shown.muted)
    stats, length = data.stats, sizing.setup.max_length
    about = "about " if stats.estimated else ""
    text = Text().append(f"{data.count:,} examples, {about}{count(data.tokens)} tokens\n", "bold")
    spread = f"half to {data.half:,}, 99% to {data.nearly_all:,}, all to {stats.longest:,}"
    text.append(spread + "\n", shown.muted)
    text.append(histogram(stats, length, width, shown))
    cut = stats.truncation(length)
    text.append("\n" + "cut".ljust(_LABEL), shown.muted)
    if cut.examples:
        share, lost = cut.examples / data.count, cut.tokens / data.tokens
        text.append(f"{cut.examples:,} examples ({share:.1%}), {lost:.2%} of tokens", shown.warning)
    else:
        text.append("none")
    if sizing.no_run:
        return text.append("\n" + plain(sizing.no_run), shown.error)
    if sizing.run is None:
        return text.append("\nbatches, steps, time and price are being worked out" + "\n" * 4, shown.muted)
    for label, value in _lines(sizing, sizing.run):
        text.append("\n" + label.ljust(_LABEL), shown.muted)
        room = max(8, width - _LABEL)
        # Of one line each, so that the panel is as high as it was laid out.
        text.append(value if label in _WRAPPED or len(value) <= room else value[: room - 1] + "…")
    return text


def _lines(sizing: Sizing, run: WholeRun) -> Iterator[tuple[str, str]]:
    setup, packing = sizing.setup, run.packing
    padded = f"{run.padding.waste:.0%} padding in batches of {setup.per_device_train_batch_size}"
    packed = f"packed in {packing.sequences:,} rows, {packing.fill:.0%} full"
    yield "batches", packed if setup.packing else padded
    yield "instead", padded if setup.packing else packed
    yield from run_lines(sizing, run)
    for note in run.data.notes:
        yield "not used", plain(note, 300)
    if run.data.left_out:
        yield "left out", plain(", ".join(run.data.left_out), 300)


def histogram(stats: DatasetStats, cut_at: int, width: int, shown: Colours) -> Text:
    """Examples by length, the lengths on a logarithmic axis, those that are cut in another colour and the cut
    itself as a line.
    """
    longest = max(stats.longest, cut_at)
    axis = _Axis(stats.lengths[0][0], longest, width)
    counts, mark = _counts(_Same(stats), longest, width), axis.column(cut_at)
    highest, text = max(counts), Text(no_wrap=True)
    for row in reversed(range(HEIGHT)):
        line = "".join(
            _LEVELS[max(0, min(8, math.ceil(number / highest * HEIGHT * 8) - row * 8))] for number in counts
        )
        text.append(line[:mark], shown.primary)
        text.append("┃", shown.accent)
        text.append(line[mark + 1 :] + "\n", shown.warning)
    return text.append(axis.labels(cut_at), shown.muted)


@dataclass(frozen=True, slots=True)
class _Same:
    """Lengths that are the same where they are one object: comparing thousands takes longer than drawing."""

    stats: DatasetStats

    def __hash__(self) -> int:
        return id(self.stats)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.stats is self.stats


@lru_cache(maxsize=32)
def _counts(same: _Same, longest: int, width: int) -> tuple[int, ...]:
    """Examples by column."""
    lengths = same.stats.lengths
    axis, counts = _Axis(lengths[0][0], longest, width), [0] * width
    for length, examples in lengths:
        counts[axis.column(length)] += examples
    return tuple(counts)


class _Axis:
    """Maps lengths to columns."""

    def __init__(self, shortest: int, longest: int, width: int) -> None:
        self._shortest, self._longest, self._width = shortest, longest, width
        self._span = math.log(longest / shortest) or 1.0

    def column(self, length: int) -> int:
        share = math.log(max(length, self._shortest) / self._shortest) / self._span
        return min(self._width - 1, int(share * self._width))

    def labels(self, cut_at: int) -> str:
        """Shortest and longest length at the ends, the cut's below its line where there is room."""
        line = list(" " * self._width)

        def put(label: str, middle: int) -> None:
            start = max(0, min(self._width - len(label), middle - len(label) // 2))
            around = line[max(0, start - 1) : start + len(label) + 1]
            if all(character == " " for character in around):
                line[start : start + len(label)] = label

        put(f"{cut_at:,} cut", self.column(cut_at))
        put(f"{self._shortest:,}", 0)
        put(f"{self._longest:,}", self._width)
        return "".join(line)
