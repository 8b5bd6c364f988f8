"""The run screen: follows one run folder, live or dead, from its files."""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from launcher.runs import record as run_record
from launcher.runs import supervisor
from launcher.runs.folder import RunFolder, anchored
from launcher.tui.run_follower import RunFollower, RunSnapshot
from launcher.tui.screens.confirm import Confirm
from launcher.tui.text import plain
from launcher.tui.widgets.breakpoints import fit_before_composing
from launcher.tui.widgets.run.charts import Charts
from launcher.tui.widgets.run.gpu_panel import GpuPanel
from launcher.tui.widgets.run.log_tail import LogTail
from launcher.tui.widgets.run.phase_comparison import PhaseComparison
from launcher.tui.widgets.run.result_panel import ResultPanel, to_do
from launcher.tui.widgets.run.run_headline import RunHeadline
from launcher.tui.widgets.run.stages_panel import StagesPanel
from launcher.tui.widgets.text_line import TextLine
from planner.answers.plan import Plan
from planner.base.errors import VramwiseError
from planner.text.data import not_trained
from planner.text.figures import dollars, duration
from planner.text.speed import hourly_price

POLL_SECONDS = 0.25
# Ends that leave a measurement, and what the record calls them.
_RECORDED = {"finished": "ok", "stopped": "ok", "oom": "oom"}


class RunScreen(Screen[None]):
    """Shows snapshots; leaving it, or the application, leaves the run alone."""

    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        # First, so that a narrow footer has it.
        Binding("question_mark", "app.help", "Help", id="run.help", tooltip="Keys and sources of numbers"),
        Binding("s", "stop", "Stop", id="run.stop", tooltip="Stop the training after this step and save"),
        Binding("slash", "search", "Search", id="run.search", tooltip="Search the log"),
        Binding("w", "warnings", show=False, id="run.warnings", tooltip="Show or fold libraries' warnings"),
        Binding("l", "load", "Load", id="run.load", tooltip="Load its setup into sizing"),
        Binding("r", "resume", "Resume", id="run.resume", tooltip="Go on from the last checkpoint"),
        *(Binding(str(n), f"copy({n})", show=False, id=f"run.copy{n}") for n in range(1, 5)),
        Binding("o", "app.open_run", "Runs", id="run.open", tooltip="Follow another run"),
        Binding("escape", "back", "Sizing", id="run.back", tooltip="Back; the run goes on"),
        Binding("d", "app.quit", "Detach", id="run.detach", tooltip="Leave vramwise; the run goes on"),
    ]

    class Polled(Message):
        """A snapshot was taken."""

        def __init__(self, snapshot: RunSnapshot) -> None:
            super().__init__()
            self.snapshot = snapshot

    class Recorded(Message):
        """The run's record was stored, or says why not."""

        def __init__(self, message: str) -> None:
            super().__init__()
            self.message = message

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._open = ExitStack()
        # The folder may be renamed while it is looked at; one that is gone is shown as it is.
        with contextlib.suppress(OSError):
            folder = self._open.enter_context(anchored(folder))
        self.folder = folder
        self.snapshot: RunSnapshot | None = None
        self._follower = RunFollower(folder)
        self._polling = False
        self._seen_alive = False
        self._keys_of_over: bool | None = None
        self._told: tuple[str, ...] = ()

    def compose(self) -> ComposeResult:
        """Headline and stages, curves beside memory, log below; of a run that is over its result first."""
        fit_before_composing(self)
        yield RunHeadline(id="run-headline")
        yield Static("", id="run-planned", classes="note")
        yield StagesPanel()
        with Container(id="run-body"):
            yield ResultPanel(id="run-result")
            yield Charts(id="run-loss")
            with Vertical(id="run-memory"):
                yield Static("memory", classes="heading")
                yield PhaseComparison()
                yield TextLine(id="gpu-heading", classes="heading")
                yield GpuPanel()
            with Vertical(id="run-log"):
                yield Static("log", classes="heading")
                yield LogTail()
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Take the first snapshot and go on taking them."""
        self.poll()
        self.set_interval(POLL_SECONDS, self._tick)

    def on_unmount(self) -> None:
        """Let go of the folder."""
        self._open.close()

    def poll(self) -> None:
        """Take a snapshot in a thread, unless one is being taken."""
        if not self._polling:
            self._polling = True
            self._poll()

    @work(thread=True, group="poll")
    def _poll(self) -> None:
        self.post_message(self.Polled(self._follower.poll()))

    @on(Polled)
    def _show(self, event: Polled) -> None:
        self._polling = False
        snapshot = event.snapshot
        self.snapshot = snapshot
        headline = self.query_one(RunHeadline)
        headline.snapshot, headline.seconds_since = snapshot, 0.0
        self._show_planned(snapshot)
        result = self.query_one(ResultPanel)
        result.snapshot, result.display = snapshot, snapshot.over
        self.query_one("#run-body").set_class(snapshot.over, "over")
        self.query_one(Charts).show(snapshot)
        self.query_one(PhaseComparison).snapshot = snapshot
        stages = self.query_one(StagesPanel)
        stages.snapshot, stages.display = snapshot, bool(snapshot.stages)
        no_gpu = snapshot.on_gpu is False
        self.query_one("#gpu-heading", TextLine).text = Text("host memory" if no_gpu else "GPU")
        self.query_one(GpuPanel).snapshot = snapshot
        self.query_one(LogTail).show(snapshot)
        self._store_when_seen_to_end(snapshot)
        if self._keys_of_over != snapshot.over:
            # Not at each snapshot: the footer is made anew, and is empty meanwhile.
            self._keys_of_over = snapshot.over
            self.refresh_bindings()
        if snapshot.behind:
            self.poll()

    def _show_planned(self, snapshot: RunSnapshot) -> None:
        plan = None if snapshot.prediction is None else snapshot.prediction.plan
        whole = snapshot.job is not None and snapshot.job.max_steps is None
        told = () if plan is None else planned(plan, whole=whole)
        place = self.query_one("#run-planned", Static)
        place.display = bool(told)
        if told != self._told:
            # A text that is the same would lay the screen out anew all the same.
            self._told = told
            place.update(Text("\n").join(map(Text, told)))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether a key is offered: a run that is over cannot be stopped, and no other goes on."""
        over = self.snapshot is not None and self.snapshot.over
        if action == "stop":
            return not over
        return over if action == "resume" else True

    def _store_when_seen_to_end(self, snapshot: RunSnapshot) -> None:
        """A run that ends before our eyes is recorded; one that was over at first is left as it is."""
        if not snapshot.over:
            self._seen_alive = self._seen_alive or snapshot.state in ("starting", "running", "stopping")
        elif self._seen_alive:
            self._seen_alive = False
            if snapshot.losses and snapshot.state in _RECORDED and not self.folder.record.exists():
                self._store(_RECORDED[snapshot.state])

    @work(thread=True, group="record")
    def _store(self, outcome: str) -> None:
        try:
            record = run_record.store_record(RunFolder(self.folder.shown), outcome)
        except (VramwiseError, OSError) as error:
            self.post_message(self.Recorded(f"not recorded: {error}"))
            return
        if record is not None:
            self.post_message(self.Recorded("predicted and measured figures are kept in record.json"))

    @on(Recorded)
    def _say_recorded(self, event: Recorded) -> None:
        self.notify(plain(event.message), title="Run record", markup=False)

    def _tick(self) -> None:
        """Between snapshots the time left counts down on the monotonic clock."""
        if self.snapshot is not None:
            self.query_one(RunHeadline).seconds_since = time.monotonic() - self.snapshot.at
            if self.snapshot.over:
                return
        self.poll()

    def action_stop(self) -> None:
        """Ask, then ask the trainer."""
        if self.snapshot is None or self.snapshot.over or self.snapshot.state == "created":
            self.notify("this run is not running", severity="warning", markup=False)
            return
        self.app.push_screen(
            Confirm(
                "Stop this run?",
                "The trainer ends after the present step and saves the adapter as it is then.",
                yes="Stop",
            ),
            self._stop,
        )

    def _stop(self, yes: bool | None) -> None:
        if not yes:
            return
        try:
            supervisor.request_stop(self.folder.path)
        except OSError as error:
            self.notify(plain(error), title="Stop not asked for", severity="error", markup=False)
            return
        self.notify("it stops after the present step and saves", title="Stop asked for", markup=False)
        self.poll()

    def action_search(self) -> None:
        """Search the log."""
        self.query_one(LogTail).search()

    def action_warnings(self) -> None:
        """Show or fold the warnings of libraries."""
        self.query_one(LogTail).toggle_warnings()

    def action_copy(self, number: int) -> None:
        """Copy the line of a next step."""
        steps = () if self.snapshot is None or not self.snapshot.over else to_do(self.snapshot)
        if number <= len(steps):
            self.app.copy_to_clipboard(steps[number - 1].command)
            self.notify(plain(steps[number - 1].command), title="Copied", timeout=12, markup=False)

    def action_load(self) -> None:
        """Take the run's setup and data to sizing."""
        if self.snapshot is not None and self.snapshot.job is not None:
            prediction = self.snapshot.prediction
            plan = None if prediction is None else prediction.plan
            self.app.load_into_sizing(self.snapshot.job, plan)  # type: ignore[attr-defined]

    def action_resume(self) -> None:
        """Go on with the run."""
        self.app.resume_run(RunFolder(self.folder.shown))  # type: ignore[attr-defined]

    def action_back(self) -> None:
        """Leave the run to itself."""
        self.app.pop_screen()


def planned(plan: Plan, *, whole: bool) -> tuple[str, ...]:
    """What the plan of a run says of it beside its figures: its price, and what of the data is not trained.

    The time and the cost of the plan are those of the `whole` run that it was made for.
    """
    price = hourly_price(plan)
    if whole and plan.data is not None and plan.duration is not None and plan.duration.usd is not None:
        price = f"{dollars(plan.duration.usd)} for the {duration(plan.duration.hours)} planned, at {price}"
    lacking = "" if plan.data is None else not_trained(plan.data)
    return (plain(f"price: {price}"), *([plain(f"data: {lacking}", 300)] if lacking else []))
