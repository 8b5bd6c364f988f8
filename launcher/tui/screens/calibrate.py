"""Calibrate: measure this GPU within so many minutes, in sight, and show how well the fit meets it."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Input, Label, ProgressBar, Static

from launcher.tui.measured.calibrating import Calibrating, FittedRun, Heard
from launcher.tui.screens.confirm import Confirm
from launcher.tui.text import plain
from launcher.tui.themes import Colours, colours
from launcher.tui.widgets.run.line_plot import LinePlot, PlotData
from launcher.tui.widgets.run.log_lines import Line, LogLines

DEFAULT_MINUTES = "5"
MOST_MINUTES = 24 * 60


class CalibrateScreen(Screen[None]):
    """Starts nothing by itself; leaving it ends what it started, and keeps what was measured."""

    AUTO_FOCUS = "#calibrate-minutes"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "app.help", "Help", id="calibrate.help", tooltip="The keys"),
        Binding("ctrl+s", "start", "Measure", id="calibrate.start", tooltip="Measure this GPU"),
        Binding("s", "stop", "Stop", id="calibrate.stop", tooltip="End it; what was measured is kept"),
        Binding("escape", "back", "Back", id="calibrate.back", tooltip="Back"),
    ]

    class Said(Message):
        """The calibration said something."""

        def __init__(self, heard: Heard) -> None:
            super().__init__()
            self.heard = heard

    class Ended(Message):
        """The calibration is over: the fit's runs, or why there are none."""

        def __init__(self, runs: tuple[FittedRun, ...], message: str) -> None:
            super().__init__()
            self.runs = runs
            self.message = message

    def __init__(self) -> None:
        super().__init__()
        self._measurement: Calibrating | None = None
        self._said: list[Line] = []
        self._runs: tuple[FittedRun, ...] = ()
        self._told = ""

    def compose(self) -> ComposeResult:
        """Minutes, progress, what is said, residuals."""
        yield Static("", id="calibrate-title")
        with Horizontal(id="calibrate-time"):
            yield Label("minutes", classes="knob-label")
            yield Input(
                DEFAULT_MINUTES,
                id="calibrate-minutes",
                compact=True,
                restrict=r"[0-9.]*",
                max_length=6,
                tooltip="How long to measure; more minutes measure larger models too",
            )
        yield ProgressBar(id="calibrate-progress", show_eta=False)
        yield LogLines(id="calibrate-said")
        with Vertical(id="calibrate-fit"):
            yield Static("", id="calibrate-fit-title", classes="heading")
            yield LinePlot()
            yield Static("", id="calibrate-models", classes="note")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Say what it does."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._draw()

    def on_unmount(self) -> None:
        """Leave no process on the GPU."""
        if self._measurement is not None:
            self._measurement.stop()

    @property
    def measuring(self) -> bool:
        """Whether it measures."""
        return self._measurement is not None

    @on(Input.Submitted, "#calibrate-minutes")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_start()

    def action_start(self) -> None:
        """Measure for the minutes that the field says."""
        if self._measurement is not None:
            return
        typed = self.query_one("#calibrate-minutes", Input).value
        try:
            minutes = float(typed)
        except ValueError:
            minutes = 0.0
        if not 0.1 <= minutes <= MOST_MINUTES:
            self._told = f"minutes: {plain(typed)!r} is not accepted: 0.1 to {MOST_MINUTES:,}"
            self._draw()
            return
        self._measurement, self._said, self._told = Calibrating(minutes), [], ""
        self.query_one(LogLines).focus()
        self._draw()
        self.refresh_bindings()
        self._measure(self._measurement)

    @work(thread=True, group="calibrate")
    def _measure(self, measurement: Calibrating) -> None:
        try:
            runs, message = measurement.run(self._say)
        except OSError as error:
            runs, message = (), f"calibrate cannot be started: {error.strerror}"
        self.post_message(self.Ended(runs, message))

    def _say(self, heard: Heard) -> None:
        self.post_message(self.Said(heard))

    @on(Said)
    def _hear(self, event: Said) -> None:
        event.stop()
        heard = event.heard
        self._said.append(((plain(heard.text), ""),))
        if heard.total is not None:
            self.query_one(ProgressBar).update(total=heard.total, progress=heard.ended or 0)
        self.query_one(LogLines).show(self._said, end=True)

    @on(Ended)
    def _end(self, event: Ended) -> None:
        event.stop()
        self._measurement = None
        self._runs, self._told = event.runs, event.message
        self._draw()
        self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """What runs can be stopped, what does not can be started."""
        if action == "stop":
            return self.measuring
        return not self.measuring if action == "start" else True

    def action_stop(self) -> None:
        """End it in order."""
        if self._measurement is not None:
            self._measurement.stop()
            self.notify("it ends, and fits what was measured", title="Calibration", markup=False)

    def action_back(self) -> None:
        """Leave; while it measures, ask."""
        if not self.measuring:
            self.app.pop_screen()
            return
        self.app.push_screen(
            Confirm(
                "End the calibration?",
                "What was measured is kept, and goes on from there next time.",
                yes="End",
            ),
            self._leave,
        )

    def _leave(self, yes: bool | None) -> None:
        if yes:
            self.app.pop_screen()

    def _draw(self) -> None:
        shown = colours(self.app)
        self.query_one("#calibrate-title", Static).update(self._title(shown))
        self.query_one(ProgressBar).display = self.measuring
        said = self.query_one(LogLines)
        said.display = self.measuring or bool(self._said)
        self.query_one("#calibrate-fit").display = bool(self._runs)
        if not self._runs:
            return
        worst = max((run.reserved for run in self._runs), key=abs)
        told = f"{len(self._runs)} runs, each beside a fit without its model; reserved {worst:+.2%} at worst"
        self.query_one("#calibrate-fit-title", Static).update(Text(told, no_wrap=True))
        self.query_one(LinePlot).data = residual_plot(self._runs)
        self.query_one("#calibrate-models", Static).update(by_model(self._runs, shown))

    def _title(self, shown: Colours) -> Text:
        text = Text().append("Calibrate", f"bold {shown.primary}")
        if self._told:
            return text.append(f"  ! {self._told}", shown.warning)
        if self.measuring:
            return text.append("  measuring; s ends it and keeps what was measured", shown.muted)
        if self._runs:
            return text.append("  done: plans rest on these runs from now on", shown.success)
        return text.append(
            "  ctrl+s measures this GPU by training models for some steps; plans then rest on it",
            shown.muted,
        )


def residual_plot(runs: tuple[FittedRun, ...]) -> PlotData:
    """Errors of reserved memory in percent, run by run, about the line of none."""
    points = tuple((float(at), 100 * run.reserved) for at, run in enumerate(runs, 1))
    return PlotData(
        points=((1.0, 0.0), (float(len(runs)), 0.0)),
        marks=points,
        x_label="run; reserved, predicted over measured, %",
        faint=True,
    )


def by_model(runs: tuple[FittedRun, ...], shown: Colours) -> Text:
    """The worst error of each model, allocated and reserved."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{'model':<24}{'runs':>6}{'allocated':>11}{'reserved':>10}\n", shown.muted)
    for model in sorted({run.model for run in runs}):
        those = [run for run in runs if run.model == model]
        allocated = max((run.allocated for run in those), key=abs)
        reserved = max((run.reserved for run in those), key=abs)
        text.append(f"{plain(model, 23):<24}{len(those):>6}{allocated:>+11.2%}{reserved:>+10.2%}\n")
    text.rstrip()
    return text
