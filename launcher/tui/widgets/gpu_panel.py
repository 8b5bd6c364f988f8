"""What the sampler sees of the GPU (or, without one, of the trainer's memory)."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Sparkline, Static

from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import GIB, gib, size


class GpuPanel(Vertical):
    """A line of figures over a sparkline of memory."""

    DEFAULT_CSS = "GpuPanel { height: auto; }"

    def compose(self) -> ComposeResult:
        """Figures and sparkline."""
        yield Static("", id="gpu-figures")
        yield Sparkline([], id="gpu-memory")

    def show(self, snapshot: RunSnapshot) -> None:
        """Show a snapshot."""
        self.query_one("#gpu-figures", Static).update(Text(figures(snapshot)))
        values = [used / GIB for _, used in snapshot.used_series]
        # Zero belongs to the scale: a flat line must look flat.
        self.query_one(Sparkline).data = [0.0, *values] if values else []


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
