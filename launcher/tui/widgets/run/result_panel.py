"""What a run that is over came to, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from launcher.runs.folder import RunFolder
from launcher.runs.report.facts import NextStep, next_steps, predicted_rate
from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import duration, gib, number, plain
from launcher.tui.themes import Colours, colours
from launcher.tui.widgets.run.snapshot_panel import SnapshotPanel

_LABEL = 10


class ResultPanel(SnapshotPanel):
    """Duration, result, where it is, and next steps, each with the key that copies its line."""

    def shape(self, snapshot: RunSnapshot) -> int:
        """Of a run that is over each snapshot counts; of one that goes on nothing is shown."""
        return snapshot.event_count if snapshot.over else 0

    def render(self) -> Text:
        """Draw the lines; none while the run goes on."""
        if self.snapshot is None or not self.snapshot.over:
            return Text("")
        return result(self.snapshot, colours(self.app))


def to_do(snapshot: RunSnapshot) -> tuple[NextStep, ...]:
    """What to do with what is there; of a run without a job nothing is known."""
    if snapshot.job is None:
        return ()
    return next_steps(RunFolder(snapshot.folder.shown), snapshot.job, snapshot.state)


def result(snapshot: RunSnapshot, shown: Colours) -> Text:
    """The panel as text."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for label, value in _facts(snapshot):
        text.append(label.ljust(_LABEL), shown.muted)
        text.append(plain(value, 400) + "\n", "bold")
    for number_, step in enumerate(to_do(snapshot), 1):
        text.append(f"{number_} copies  ", shown.primary)
        text.append(f"{step.what}: ")
        text.append(plain(step.command, 400) + "\n", shown.muted)
    text.append("l ", shown.primary)
    text.append("loads its setup into sizing, to run it again")
    return text


def _facts(snapshot: RunSnapshot) -> Iterator[tuple[str, str]]:
    if snapshot.seconds is not None:
        yield "took", f"{duration(snapshot.seconds)} for {snapshot.step:,} steps"
    if snapshot.losses and snapshot.first_loss is not None:
        told = f"loss {number(snapshot.first_loss)} at first, {number(snapshot.losses[-1][1])} at the end"
        if snapshot.best_evaluation is not None:
            loss, step = snapshot.best_evaluation
            told += f"; evaluation {number(loss)} at best, after step {step:,}"
        yield "result", told
    plan = None if snapshot.prediction is None else snapshot.prediction.plan
    if snapshot.tokens_per_second is not None:
        forecast = None if plan is None or snapshot.on_gpu is False else predicted_rate(plan)
        beside = "" if forecast is None else f", forecast {number(forecast)}"
        peak = _peak(snapshot)
        yield "measured", f"{number(snapshot.tokens_per_second)} tokens/s{beside}{peak}"
    adapter = RunFolder(snapshot.folder.shown).adapter
    if adapter.is_dir():
        at = "" if snapshot.adapter_step is None else f", as it was after step {snapshot.adapter_step:,}"
        yield "saved", f"{adapter}{at}"


def _peak(snapshot: RunSnapshot) -> str:
    measured = [one.process_bytes for one in snapshot.memory if isinstance(one.process_bytes, int)]
    if not measured or not snapshot.on_gpu:
        return ""
    planned = None if snapshot.prediction is None else snapshot.prediction.memory.peak_bytes
    beside = "" if planned is None else f", planned {gib(planned)}"
    return f"; peak {gib(max(measured))}{beside}"
