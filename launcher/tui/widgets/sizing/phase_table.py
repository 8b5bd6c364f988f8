"""Memory of each phase, predicted, and what the numbers of the largest one are called elsewhere."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.text import plain, signed_size, size
from launcher.tui.themes import colours
from planner.memory import MemoryBreakdown

_BAR = 10


class PhaseTable(Widget):
    """One line a phase; the peak is marked. Where memory is `pinned`, the difference to it stands beside."""

    DEFAULT_CSS = "PhaseTable { height: auto; }"

    memory: reactive[MemoryBreakdown | None] = reactive(None)
    pinned: reactive[MemoryBreakdown | None] = reactive(None)

    def watch_memory(self, old: MemoryBreakdown | None, new: MemoryBreakdown | None) -> None:
        """Lay out anew only where the number of lines changes."""
        if _phase_count(old) != _phase_count(new):
            self.refresh(layout=True)

    def render(self) -> Text:
        """Draw the lines."""
        if self.memory is None:
            return Text("")
        shown = colours(self.app)
        width = max(30, self.content_size.width)
        return phases(self.memory, width, muted=shown.muted, strong=shown.primary, pinned=self.pinned)


def _phase_count(memory: MemoryBreakdown | None) -> int:
    return 0 if memory is None else len(memory.phases)


def phases(
    memory: MemoryBreakdown, width: int, *, muted: str, strong: str, pinned: MemoryBreakdown | None = None
) -> Text:
    """The table of phases, then where the peak lies, then allocated, reserved and the driver's figure."""
    text = Text(no_wrap=True, overflow="ellipsis")
    peak = memory.peak_phase
    largest = max(1, memory.peak_bytes)
    bar = min(_BAR, max(0, width - 26))
    before = {} if pinned is None else {phase.name: phase.process_bytes for phase in pinned.phases}
    for phase in memory.phases:
        is_peak = phase is peak
        text.append("▸ " if is_peak else "  ", strong)
        text.append(f"{phase.name:<11}", "bold" if is_peak else "")
        text.append(f"{size(phase.process_bytes):>10}  ", "bold" if is_peak else "")
        if pinned is None:
            filled = round(phase.process_bytes / largest * bar)
            text.append("━" * filled, strong if is_peak else muted)
        else:
            text.append(signed_size(phase.process_bytes - before.get(phase.name, 0)), "bold")
        text.append("\n")
    # One line, whatever it says: the table keeps its height, and nothing is laid out anew.
    text.append(f"peak: {plain(peak.peak_moment)}", muted)
    for name, figure in (
        ("allocated", memory.allocated_bytes),
        ("reserved", memory.reserved_bytes),
        ("driver", memory.process_bytes),
    ):
        text.append(f"\n  {name:<11}{size(figure):>10}", muted)
    return text
