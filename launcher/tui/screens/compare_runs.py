"""Two runs beside each other: the settings that differ, and their losses over each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from launcher.runs.training_job import TrainingJob
from launcher.tui.run_facts import Points
from launcher.tui.run_follower import RunFollower
from launcher.tui.run_rows import RunRow
from launcher.tui.text import GIB, duration, number, plain
from launcher.tui.themes import Colours, colours
from launcher.tui.widgets.run.charts import smoothed
from launcher.tui.widgets.run.line_plot import LinePlot, PlotData

_LABEL = 28
_BESIDE = frozenset({"setup", "model_source"})


class CompareRuns(Screen[None]):
    """Reads both runs once."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back", id="compare.back", tooltip="Back to the runs"),
    ]

    class Read(Message):
        """Both have been read: their losses."""

        def __init__(self, losses: tuple[Points, Points], jobs: tuple[TrainingJob | None, ...]) -> None:
            super().__init__()
            self.losses = losses
            self.jobs = jobs

    def __init__(self, one: RunRow, other: RunRow) -> None:
        super().__init__()
        self._runs = one, other
        self._jobs: tuple[TrainingJob | None, ...] = (None, None)

    def compose(self) -> ComposeResult:
        """Names, curves, differences."""
        yield Static("", id="compare-title")
        with Vertical(id="compare-curves"):
            yield LinePlot()
        with VerticalScroll(id="compare-scroll"):
            yield Static("reading both", id="compare-table", classes="note")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Read both."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._draw()
        self._read()

    @work(thread=True)
    def _read(self) -> None:
        losses, jobs = [], []
        for row in self._runs:
            follower = RunFollower(row.folder)
            snapshot = follower.poll()
            while snapshot.behind:
                snapshot = follower.poll()
            losses.append(smoothed(snapshot.losses))
            jobs.append(snapshot.job)
        self.post_message(self.Read((losses[0], losses[1]), tuple(jobs)))

    @on(Read)
    def _show(self, event: Read) -> None:
        event.stop()
        self._jobs = event.jobs
        first, second = event.losses
        self.query_one(LinePlot).data = PlotData(points=first, second=second, x_label="step, loss smoothed")
        self._draw()

    def _draw(self) -> None:
        shown = colours(self.app)
        one, other = self._runs
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(f"━ {plain(one.name, 60)}", f"bold {shown.primary}")
        title.append("  beside  ", shown.muted)
        title.append(f"━ {plain(other.name, 60)}", f"bold {shown.accent}")
        self.query_one("#compare-title", Static).update(title)
        if any(job is not None for job in self._jobs):
            self.query_one("#compare-table", Static).update(self._table(shown))

    def _table(self, shown: Colours) -> Text:
        text = Text()
        text.append("settings that differ\n", f"bold {shown.primary}")
        settings = list(differences(*self._jobs))
        for label, one, other in settings:
            _line(text, label, one, other, shown)
        if not settings:
            text.append("none\n", shown.muted)
        text.append("\nwhat became of them\n", f"bold {shown.primary}")
        for label, one, other in zip(_LABELS, _told(self._runs[0]), _told(self._runs[1]), strict=True):
            _line(text, label, one, other, shown)
        return text


def _line(text: Text, label: str, one: str, other: str, shown: Colours) -> None:
    text.append(plain(label, _LABEL - 1).ljust(_LABEL), shown.muted)
    text.append(plain(one, 40), shown.primary)
    text.append("  ·  ", shown.muted)
    text.append(plain(other, 40) + "\n", shown.accent)


def differences(one: TrainingJob | None, other: TrainingJob | None) -> Iterator[tuple[str, str, str]]:
    """Settings that differ between two jobs, each with both values."""
    if one is None or other is None:
        return
    for mine, yours in (
        (one.setup.to_dict(), other.setup.to_dict()),
        (_beside(one), _beside(other)),
    ):
        for name in mine:
            if mine[name] != yours.get(name):
                yield name, _shown(mine[name]), _shown(yours.get(name))


def _beside(job: TrainingJob) -> dict[str, object]:
    return {name: value for name, value in job.to_dict().items() if name not in _BESIDE}


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


_LABELS = ("state", "steps", "loss", "evaluation", "tokens/s", "peak GiB", "took")


def _told(row: RunRow) -> tuple[str, ...]:
    now = row.status
    return (
        now.state,
        f"{now.step:,}",
        number(row.loss),
        number(row.evaluation),
        number(row.tokens_per_second),
        "-" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}",
        "-" if row.seconds is None else duration(row.seconds),
    )
