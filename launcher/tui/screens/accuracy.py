"""Accuracy: predicted beside measured of all of one's own runs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from launcher.tui.measured.own_runs import Errors, OwnRun, errors_of, own_runs
from launcher.tui.text import GIB, number, plain
from launcher.tui.themes import Colours, colours
from launcher.tui.widgets.run.line_plot import LinePlot, PlotData

_HEADS = ("run", "memory", "peak GiB", "planned", "speed", "tokens/s", "forecast", "model", "method", "card")
_CLOSE, _FAR = 0.02, 0.10
"""Errors of memory and of speed up to which a run counts as told right: two percent, ten percent."""


class AccuracyScreen(Screen[None]):
    """Reads the records once."""

    AUTO_FOCUS = "#accuracy-table"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "app.help", "Help", id="accuracy.help", tooltip="The keys"),
        Binding("b", "app.calibrate", "Calibrate", id="accuracy.calibrate", tooltip="Measure this GPU"),
        Binding("escape", "app.pop_screen", "Back", id="accuracy.back", tooltip="Back"),
    ]

    class Read(Message):
        """The records have been read."""

        def __init__(self, runs: tuple[OwnRun, ...], unread: tuple[str, ...]) -> None:
            super().__init__()
            self.runs = runs
            self.unread = unread

    def __init__(self, runs_root: Path) -> None:
        super().__init__()
        self._root = runs_root
        self._runs: tuple[OwnRun, ...] | None = None
        self._unread: tuple[str, ...] = ()

    def compose(self) -> ComposeResult:
        """A summary over two plots and a table."""
        yield Static("", id="accuracy-title")
        with Container(id="accuracy-plots"):
            for name in ("memory", "speed"):
                with Vertical(id=f"accuracy-{name}", classes="chart"):
                    yield Static("", id=f"accuracy-{name}-title", classes="heading")
                    yield LinePlot()
        yield DataTable(id="accuracy-table", cursor_type="row", zebra_stripes=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Read."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._draw()
        self._read()

    @work(thread=True, group="accuracy")
    def _read(self) -> None:
        self.post_message(self.Read(*own_runs(self._root)))

    @on(Read)
    def _take(self, event: Read) -> None:
        event.stop()
        self._runs, self._unread = event.runs, event.unread
        self._draw()

    def _draw(self) -> None:
        shown, runs = colours(self.app), self._runs or ()
        self.query_one("#accuracy-title", Static).update(self._title(shown))
        memory, speed = self._headings()
        for name, title, data in (
            ("memory", memory, scatter(memory_points(runs), "measured, GiB")),
            ("speed", speed, scatter(speed_points(runs), "measured, tokens/s")),
        ):
            place = self.query_one(f"#accuracy-{name}", Vertical)
            place.query_one(Static).update(Text(title, no_wrap=True))
            place.query_one(LinePlot).data = data
        self.query_one("#accuracy-plots").set_class(bool(runs), "shown")
        table = self.query_one(DataTable)
        table.clear(columns=True)
        lines = [_cells(run, shown) for run in runs]
        for index, head in enumerate(_HEADS):
            width = max(len(head), *(len(cells[index]) for cells in lines), 0)
            table.add_column(head, width=width)
        for cells in lines:
            table.add_row(*cells)

    def on_resize(self) -> None:
        """Say in words what there is no room to draw, or draw it."""
        self._draw()

    def _headings(self) -> tuple[str, str]:
        runs = self._runs or ()
        return (
            heading("memory, GiB", errors_of([run.memory_error for run in runs])),
            heading("tokens/s", errors_of([run.speed_error for run in runs])),
        )

    def _title(self, shown: Colours) -> Text:
        text = Text().append("Accuracy", f"bold {shown.primary}")
        if self._runs is None:
            return text.append("  reading ...", shown.muted)
        if not self._runs:
            return text.append(
                "  no run of yours has been measured on a GPU yet. Each that ends is; b measures this GPU",
                shown.muted,
            )
        text.append(f"  {len(self._runs):,} runs of yours beside what was predicted", shown.muted)
        if self.has_class("-tiny"):
            # There the plots have no room.
            text.append("\n" + "\n".join(self._headings()))
        for one in self._unread[:1]:
            text.append(f"  ! {plain(one, 120)}", shown.warning)
        return text


def heading(what: str, errors: Errors | None) -> str:
    """What a plot shows, and the errors of its predictions: the median of their sizes and the worst."""
    if errors is None:
        return f"{what}: no run says"
    return f"{what}: median {errors.median:.1%}, worst {errors.worst:+.1%} of {errors.runs}"


def memory_points(runs: tuple[OwnRun, ...]) -> list[tuple[float, float]]:
    """Measured and predicted GiB of each run that has both."""
    return [
        (run.measured_bytes / GIB, run.predicted_bytes / GIB)
        for run in runs
        if run.measured_bytes and run.predicted_bytes
    ]


def speed_points(runs: tuple[OwnRun, ...]) -> list[tuple[float, float]]:
    """Measured and forecast tokens a second of each run that has both."""
    return [
        (run.measured_rate, run.predicted_rate) for run in runs if run.measured_rate and run.predicted_rate
    ]


def scatter(points: list[tuple[float, float]], label: str) -> PlotData:
    """Runs as points, and the line on which predicted is measured."""
    if not points:
        return PlotData()
    most = max(max(point) for point in points)
    return PlotData(
        points=((0.0, 0.0), (most, most)),
        marks=tuple(sorted(points)),
        x_label=f"{label}; line: as predicted",
        faint=True,
    )


def _cells(run: OwnRun, shown: Colours) -> list[Text]:
    return [
        Text(plain(run.id, 24)),
        _told(run.memory_error, _CLOSE, shown),
        _right("-" if run.measured_bytes is None else f"{run.measured_bytes / GIB:.2f}"),
        _right("-" if run.predicted_bytes is None else f"{run.predicted_bytes / GIB:.2f}"),
        _told(run.speed_error, _FAR, shown),
        _right(number(run.measured_rate)),
        _right(number(run.predicted_rate)),
        Text(plain(run.model.rstrip("/").split("/")[-1], 24)),
        Text(run.method),
        Text(plain(run.gpu, 20), shown.muted),
    ]


def _told(error: float | None, close: float, shown: Colours) -> Text:
    """An error with a sign of its own: colour alone tells nothing."""
    if error is None:
        return _right("-")
    within = abs(error) <= close
    text = f"{'✓' if within else '!'} {error:+.1%}"
    return Text(text, shown.success if within else shown.warning, justify="right")


def _right(text: str) -> Text:
    return Text(text, justify="right")
