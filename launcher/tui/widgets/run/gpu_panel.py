"""What the sampler sees of the GPU (or, without one, of the trainer's memory), and its course."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.text import Text

from launcher.tui.run_facts import Points, of_each_gpu
from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import gib, size
from launcher.tui.themes import colours
from launcher.tui.widgets.run.snapshot_panel import SnapshotPanel

_LEVELS = " ▁▂▃▄▅▆▇█"
_LABEL = 8
_HOT = 100.0
"""What the course of temperature has at its full height, °C."""


class GpuPanel(SnapshotPanel):
    """Figures over the courses of memory, utilisation, temperature and power; a line for each of several."""

    def shape(self, snapshot: RunSnapshot) -> int:
        """How many courses there are."""
        return len(list(courses(snapshot))) + len(snapshot.curves.gpus)

    def render(self) -> Text:
        """Draw figures and courses."""
        if self.snapshot is None:
            return Text("")
        shown = colours(self.app)
        text = Text(figures(self.snapshot))
        width = max(10, self.content_size.width - _LABEL)
        for label, values, full in courses(self.snapshot):
            text.append("\n" + label.ljust(_LABEL), shown.muted)
            text.append(course(values, full, width), f"{shown.primary} on {shown.panel}")
        sample = self.snapshot.sample
        now = {} if sample is None else of_each_gpu(sample)
        for rank, points in self.snapshot.curves.gpus:
            used, busy = now.get(rank, (None, None))
            told = "" if used is None else f" {gib(used)}"
            told += "" if busy is None else f" {busy:.0f}%"
            text.append("\n" + f"GPU {rank}".ljust(_LABEL), shown.muted)
            line = course(_values(points), _full(self.snapshot, points), max(10, width - 16))
            text.append(line, f"{shown.primary} on {shown.panel}")
            text.append(told)
        return text


def courses(snapshot: RunSnapshot) -> Iterator[tuple[str, Sequence[float], float]]:
    """Label, values and what fills the height, of all that the driver tells."""
    curves = snapshot.curves
    if curves.used:
        yield "memory", _values(curves.used), _full(snapshot, curves.used)
    for label, points, full in (
        ("busy %", curves.busy, 100.0),
        ("°C", curves.temperatures, _HOT),
        ("W", curves.watts, max(_values(curves.watts), default=1.0)),
    ):
        if points:
            yield label, _values(points), full


def _values(points: Points) -> list[float]:
    return [value for _, value in points]


def _full(snapshot: RunSnapshot, points: Points) -> float:
    """The card's memory where it is known, else the most that was used."""
    total = None if snapshot.sample is None else snapshot.sample.total_bytes
    return total if isinstance(total, int) else max(_values(points), default=1.0)


def course(values: Sequence[float], total: float, width: int) -> str:
    """Values over time in one line of blocks, the largest of each stretch shown, zero at the bottom."""
    stretches = min(width, len(values))
    cuts = [round(i * len(values) / stretches) for i in range(stretches + 1)]
    peaks = [max(values[a:b]) for a, b in itertools.pairwise(cuts)]
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[min(top, max(0, round(peak / max(total, 1) * top)))] for peak in peaks)


def figures(snapshot: RunSnapshot) -> str:
    """The last sample in words; what the driver does not tell is left out."""
    sample = snapshot.sample
    if sample is None:
        return "no sample yet"
    parts: list[str] = []
    if isinstance(sample.used_bytes, int):
        total = f" of {gib(sample.total_bytes)}" if isinstance(sample.total_bytes, int) else ""
        parts.append(f"{gib(sample.used_bytes)}{total} used")
    elif isinstance(sample.process_bytes, int):
        parts.append(f"trainer holds {size(sample.process_bytes)} of host memory")
    for value, unit in (
        (sample.utilization_percent, "% busy"),
        (sample.temperature_c, " °C"),
        (sample.power_w, " W"),
    ):
        if isinstance(value, int | float):
            parts.append(f"{value:.0f}{unit}")
    if sample.slowed_by:
        parts.append(f"slowed by {sample.slowed_by}")
    return " · ".join(parts) or "the driver tells nothing"
