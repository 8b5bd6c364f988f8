"""What the sampler sees of the GPU (or, without one, of the trainer's memory)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import gib, size
from launcher.tui.themes import colours

_LEVELS = " ▁▂▃▄▅▆▇█"


class GpuPanel(Widget):
    """A line of figures over the course of memory, its full height being the card's total."""

    DEFAULT_CSS = "GpuPanel { height: auto; }"

    snapshot: reactive[RunSnapshot | None] = reactive(None, layout=True)

    def render(self) -> Text:
        """Draw figures and course."""
        if self.snapshot is None:
            return Text("")
        shown = colours(self.app)
        text = Text(figures(self.snapshot))
        sample = self.snapshot.sample
        values = [used for _, used in self.snapshot.used_series]
        if sample is None or not values:
            return text
        total = sample.total_bytes if isinstance(sample.total_bytes, int) else max(values)
        line = course(values, total, max(10, self.content_size.width))
        return text.append("\n").append(line, f"{shown.primary} on {shown.panel}")


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
    return " · ".join(parts) or "the driver tells nothing"
