"""Memory predicted beside measured, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from launcher.runs.events import MemoryEvent
from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import size
from launcher.tui.themes import Colours, colours
from launcher.tui.widgets.run.snapshot_panel import SnapshotPanel
from planner.memory.breakdown import PHASES, PhaseMemory

_FIGURES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One phase; None where there is no figure. `error` is predicted over measured, less one."""

    phase: str
    predicted_bytes: int | None
    measured_bytes: int | None

    @property
    def error(self) -> float | None:
        """Relative error of the prediction; positive when it was too high."""
        if not self.predicted_bytes or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


class PhaseComparison(SnapshotPanel):
    """Two bars a phase: predicted above, measured below."""

    def shape(self, snapshot: RunSnapshot) -> tuple[int, str, bool | None]:
        """How many phases there are, what stands below them, and whether each has two lines."""
        return len(compare(snapshot)), _footnote(snapshot), snapshot.on_gpu

    def render(self) -> Text:
        """Draw the bars over the widget's width."""
        if self.snapshot is None:
            return Text("")
        return comparison(self.snapshot, max(30, self.content_size.width), colours(self.app))


def compare(snapshot: RunSnapshot) -> tuple[Compared, ...]:
    """The phases that were predicted or measured, by the driver's figure or else torch's reserved bytes."""
    measured = {event.phase: event for event in snapshot.memory}
    predicted = {p.name: p for p in snapshot.prediction.memory.phases} if snapshot.prediction else {}
    on_gpu = snapshot.on_gpu is not False
    return tuple(
        Compared(
            phase=phase,
            predicted_bytes=_predicted(predicted.get(phase), measured.get(phase)),
            measured_bytes=_measured(measured.get(phase)),
        )
        for phase in PHASES
        if phase in measured or (on_gpu and phase in predicted)
    )


def comparison(snapshot: RunSnapshot, width: int, drawn: Colours) -> Text:
    """The table with its bars."""
    text = Text(no_wrap=False)
    rows = compare(snapshot)
    comparable = snapshot.on_gpu is not False
    largest = max((b for row in rows for b in (row.predicted_bytes, row.measured_bytes) if b), default=1)
    bar = max(4, width - 11 - _FIGURES - 9)
    for row in rows:
        text.append(f"{row.phase:<11}", "bold")
        if comparable:
            _bar_line(text, row.predicted_bytes, bar, largest, drawn.accent, " planned")
            text.append("\n" + " " * 11)
        if row.measured_bytes is None:
            text.append("not measured yet", drawn.muted)
        else:
            _bar_line(text, row.measured_bytes, bar, largest, drawn.success, _error(row, comparable))
        text.append("\n")
    if not rows:
        text.append("no phase measured yet\n", drawn.muted)
    text.append(_footnote(snapshot), drawn.muted)
    return text


def _bar_line(text: Text, value: int | None, bar: int, largest: int, colour: str, tail: str) -> None:
    filled = max(1, round(value / largest * bar)) if value else 0
    text.append("━" * filled + " " * (bar - filled), colour)
    text.append(f"{size(value) if value else '-':>{_FIGURES}}{tail}")


def _error(row: Compared, comparable: bool) -> str:
    if not comparable or row.error is None:
        return ""
    return f" {row.error:+.1%}"


def _footnote(snapshot: RunSnapshot) -> str:
    if snapshot.on_gpu is False:
        return "on the CPU: the trainer's resident memory, not what a GPU would need"
    if snapshot.prediction is None:
        return "this model's memory could not be predicted"
    stored = snapshot.prediction.plan is not None
    source = "in plan.json" if stored else "worked out now, for want of plan.json"
    return f"planned {source}; % is planned over measured"


def _predicted(phase: PhaseMemory | None, event: MemoryEvent | None) -> int | None:
    if phase is None:
        return None
    driver_silent = event is not None and event.process_bytes is None
    return phase.reserved_bytes if driver_silent else phase.process_bytes


def _measured(event: MemoryEvent | None) -> int | None:
    if event is None:
        return None
    found = event.reserved_bytes if event.process_bytes is None else event.process_bytes
    return found if isinstance(found, int) else None
