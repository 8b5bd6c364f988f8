"""The terminal application: owns the screens, the themes and the signals."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import events, on, work
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.theme import Theme

from launcher.runs.folder import RunFolder
from launcher.runs.job import model_source
from launcher.runs.report.facts import plan_or_none
from launcher.runs.training_job import TrainingJob
from launcher.tui import runs, starting
from launcher.tui.beginning.live import FollowsLive
from launcher.tui.cards import Card, card_of
from launcher.tui.pauses import collect_idle
from launcher.tui.screens.accuracy import AccuracyScreen
from launcher.tui.screens.calibrate import CalibrateScreen
from launcher.tui.screens.confirm import Confirm
from launcher.tui.screens.help import Help
from launcher.tui.screens.reading import Opening, Reading
from launcher.tui.screens.run import RunScreen
from launcher.tui.screens.runs import RunsScreen
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.screens.start_run import RunWish, StartRun
from launcher.tui.screens.waiting import Waiting
from launcher.tui.sizing import Sizing, Verdict
from launcher.tui.text import gib, plain
from launcher.tui.themes import DARK, LIGHT, completed
from launcher.tui.widgets.breakpoints import HEIGHTS, WIDTHS
from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError, UnknownNameError, VramwiseError
from planner.base.settings import change_setting, settings_path
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

COLLECT_SECONDS, IDLE_SECONDS = 60.0, 2.0
"""How often what is not needed is collected, and how long nothing was pressed before."""


class VramwiseApp(FollowsLive):
    """Sizing first, with a run over it when a run folder is given.

    Sizing opens with `model` and `setup`, or with what `opening` reads while a screen says so; if
    `automatic`, it goes on to what `plan` chooses for the model and the card.
    `runs_root` is where run folders are looked for and made, `data` what the form for a new run starts with.
    With `allow_download` models and data that are not on this machine may be fetched from the Hub. `price` is
    the person's own for an hour of a GPU, `theme` the one to begin with, null for the usual one. With `keeps`
    a theme that is picked is kept as a setting.
    """

    TITLE = "vramwise"
    CSS_PATH = "app.tcss"
    HORIZONTAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = WIDTHS  # type: ignore[misc]
    VERTICAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = HEIGHTS  # type: ignore[misc]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "help", "Help", id="app.help", tooltip="Keys, and where numbers are from"),
        Binding("ctrl+q", "quit", "Quit", id="app.quit", priority=True, tooltip="Leave; runs go on"),
    ]

    class RunStarted(Message):
        """A run was started."""

        def __init__(self, started: starting.Started) -> None:
            super().__init__()
            self.started = started

    class RunRefused(Message):
        """A run could not be started; what was wished is asked for again."""

        def __init__(self, message: str, sizing: Sizing, wish: RunWish) -> None:
            super().__init__()
            self.message = message
            self.sizing = sizing
            self.wish = wish

    class Kept(Message):
        """Settings were kept, or could not be."""

        def __init__(self, message: str, *, refused: bool = False) -> None:
            super().__init__()
            self.message = message
            self.refused = refused

    class NotResumed(Message):
        """A run cannot go on."""

        def __init__(self, message: str) -> None:
            super().__init__()
            self.message = message

    class GpuNotFree(Message):
        """A run can start once its GPU is free."""

        def __init__(self, error: starting.NotFreeError, sizing: Sizing, wish: RunWish) -> None:
            super().__init__()
            self.error = error
            self.sizing = sizing
            self.wish = wish

    def __init__(
        self,
        *,
        model: ModelSpec | None = None,
        card: Card,
        setup: TrainingSetup | None = None,
        opening: Opening | None = None,
        automatic: bool = False,
        runs_root: Path,
        run: RunFolder | None = None,
        data: str = "",
        allow_download: bool = False,
        price: float | None = None,
        theme: str | None = None,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        if theme is not None and theme not in self.available_themes:
            raise UnknownNameError("theme", theme, list(self.available_themes), "(see config list)")
        self.theme = DARK.name if theme is None else theme
        self._sizing_of = partial(SizingScreen, card=card, automatic=automatic, data=data, price=price)
        self._opening = opening
        self.refusal = ""
        if model is not None and setup is not None:
            self._first: SizingScreen | None = self._sizing_of(model, setup=setup)
        else:
            self._first = None
        self._run = run
        self._keeps = keeps
        self._runs_root = runs_root
        self._data = data
        self.allow_download = allow_download
        self._started: list[starting.Started] = []
        self._touched = time.monotonic()
        self._followed: dict[Path, RunFolder] = {} if run is None else {run.path: run}

    def get_css_variables(self) -> dict[str, str]:
        """The theme's variables, with those that this interface needs beside Textual's."""
        self.theme_variables = completed(self.current_theme, super().get_css_variables())
        return self.theme_variables

    def on_mount(self) -> None:
        """Show the first screen."""
        self.theme_changed_signal.subscribe(self, self._redraw)
        if self._keeps:
            self.theme_changed_signal.subscribe(self, lambda theme: self.keep_settings({"theme": theme.name}))
        self._handle_signals()
        self.set_interval(COLLECT_SECONDS, self.collect_if_idle)
        if self._first is not None:
            self._open(self._first)
        elif self._opening is not None:
            self.push_screen(Reading(self._opening), self._opened)

    async def on_event(self, event: events.Event) -> None:
        """Note when a key or the mouse was used."""
        if isinstance(event, events.InputEvent):
            self._touched = time.monotonic()
        await super().on_event(event)

    def collect_if_idle(self) -> None:
        """Collect what is not needed any more, unless somebody is at work."""
        if time.monotonic() - self._touched > IDLE_SECONDS:
            collect_idle()

    def _opened(self, found: tuple[ModelSpec, TrainingSetup] | str | None) -> None:
        """Go on with the model that was described; without one there is nothing to show."""
        if found is None or isinstance(found, str):
            self.refusal = found or ""
            self.exit(return_code=ExitCode.BAD_INPUT)
            return
        model, setup = found
        self._first = self._sizing_of(model, setup=setup)
        self._open(self._first)

    def _open(self, first: SizingScreen) -> None:
        self.push_screen(first)
        if self._run is not None:
            self.push_screen(RunScreen(self._run))
        else:
            self.look_for_live()

    @property
    def runs_root(self) -> Path:
        """Where run folders are looked for and made."""
        return self._runs_root

    @property
    def model_name(self) -> str | None:
        """The model that is sized; None where none could be read."""
        return None if self._first is None else self._first.model_name

    @work(thread=True, group="settings")
    def keep_settings(self, values: Mapping[str, object], told: str = "") -> None:
        """Keep settings, with None forget them, and say so; what cannot be kept is for this time."""
        try:
            for name, value in values.items():
                change_setting(name, value)
        except InputError as error:
            self.post_message(self.Kept(str(error), refused=True))
            return
        if told:
            self.post_message(self.Kept(f"{told}: kept in {settings_path()}"))

    @on(Kept)
    def _say_kept(self, event: Kept) -> None:
        self.notify(
            plain(event.message),
            title="Settings",
            severity="error" if event.refused else "information",
            markup=False,
        )

    def _redraw(self, _: Theme) -> None:
        """Draw anew what is drawn in the theme's colours: Textual keeps what a widget drew before."""
        for screen in self.screen_stack:
            for widget in screen.query("*"):
                widget.refresh(layout=True)

    def start_run(self, sizing: Sizing) -> None:
        """Ask what to train on, then start."""
        try:
            starting.refuse_what_cannot_start(sizing)
        except VramwiseError as error:
            self.notify(plain(error), title="Training cannot start", severity="error", markup=False)
            return
        if sizing.verdict is Verdict.FITS:
            self._ask_wish(sizing)
            return
        short = gib(-sizing.headroom_bytes)
        self.push_screen(
            Confirm(
                "This does not surely fit. Start anyway?",
                f"The upper end of the estimate is {short} above what the card leaves.",
                yes="Go on",
            ),
            lambda yes: self._ask_wish(sizing) if yes else None,
        )

    def _ask_wish(self, sizing: Sizing, *, wish: RunWish | None = None, refusal: str = "") -> None:
        setup = sizing.setup
        form = StartRun(
            title=f"Train {setup.model} with {setup.method} at {setup.max_length:,} tokens",
            model_source=model_source(setup.model, sizing.model),
            data=self._data if sizing.wishes.data is None else sizing.wishes.data.path,
            epochs=sizing.wishes.num_train_epochs,
            runs=str(self._runs_root),
            wish=wish,
            refusal=refusal,
            foresee=partial(starting.foresee, sizing),
        )
        self.push_screen(form, lambda wish: None if wish is None else self._start(sizing, wish))

    def _start(self, sizing: Sizing, wish: RunWish) -> None:
        self._data, self._runs_root = str(wish.data), wish.runs
        self.notify("planning on the data, then starting the trainer", title="Starting", markup=False)
        self._start_processes(sizing, wish)

    @work(thread=True, group="start")
    def _start_processes(self, sizing: Sizing, wish: RunWish) -> None:
        try:
            started = starting.start(sizing, wish, allow_download=self.allow_download)
            self.post_message(self.RunStarted(started))
        except starting.NotFreeError as error:
            self.post_message(self.GpuNotFree(error, sizing, wish))
        except VramwiseError as error:
            self.post_message(self.RunRefused(str(error), sizing, wish))
        except OSError as error:
            self.post_message(self.RunRefused(f"{error.filename}: {error.strerror}", sizing, wish))

    @on(RunStarted)
    def _follow_started(self, event: RunStarted) -> None:
        self._started.append(event.started)
        self.follow(event.started.folder)

    @on(RunRefused)
    def _say_refused(self, event: RunRefused) -> None:
        self.clear_notifications()
        self._ask_wish(event.sizing, wish=event.wish, refusal=event.message)

    @on(GpuNotFree)
    def _wait_for_gpu(self, event: GpuNotFree) -> None:
        """Wait in sight of the person, who may go back to the form; then start, as was wished."""
        error, sizing, wish = event.error, event.sizing, event.wish
        self.clear_notifications()
        self.push_screen(
            Waiting(str(error), lambda: starting.first_in_the_way(error.positions, error.need_bytes)),
            lambda free: self._start(sizing, wish) if free else self._ask_wish(sizing, wish=wish),
        )

    def runs_that_go_on(self) -> tuple[RunFolder, ...]:
        """Runs that were started or followed here and whose trainer is alive."""
        return tuple(one for one in self._followed.values() if runs.goes_on(one))

    def action_help(self) -> None:
        """Show the keys of the screen, and where its numbers come from."""
        screen = self.screen
        if isinstance(screen, Help):
            screen.dismiss()
            return
        known = (*type(screen).BINDINGS, *self.BINDINGS)
        keys = [
            (one.key_display or one.key, one.tooltip)
            for one in known
            if isinstance(one, Binding) and one.tooltip and one.action != "app.help"
        ]
        numbers = screen.explained() if isinstance(screen, SizingScreen) else ()
        self.push_screen(Help(keys, numbers))

    def action_open_run(self) -> None:
        """Show the runs."""
        self.push_screen(RunsScreen(self._runs_root))

    def action_accuracy(self) -> None:
        """Show predicted beside measured of the person's own runs."""
        self.push_screen(AccuracyScreen(self._runs_root))

    def action_calibrate(self) -> None:
        """Ask for minutes, then measure this GPU."""
        self.push_screen(CalibrateScreen())

    def follow_path(self, path: str) -> None:
        """Show a run by the path of its folder."""
        folder = RunFolder(Path(path).expanduser().resolve())
        if not (folder.job.is_file() or folder.events.is_file()):
            self.notify(
                f"{plain(folder.path, 200)} holds no job.json and no events.jsonl",
                title="No run folder",
                severity="error",
                markup=False,
            )
            return
        self.follow(folder)

    def load_run(self, folder: RunFolder) -> None:
        """Take a run's setup, data and card to sizing.

        Raises:
            InputError: the folder holds no job.
        """
        self.load_into_sizing(folder.read_job(), plan_or_none(folder))

    def load_into_sizing(self, job: TrainingJob, plan: Plan | None) -> None:
        """Take a job's setup and data, and the card that it was planned for, to sizing."""
        card = None if plan is None else card_of(plan.gpu)
        first = self._first
        if first is None:
            return
        while self.screen is not first:
            self.pop_screen()
        first.load(job.setup, card=card, data=job.data_path, epochs=job.num_train_epochs)

    @work(thread=True, group="start")
    def resume_run(self, folder: RunFolder) -> None:
        """Go on with a run, and follow it."""
        try:
            self.post_message(self.RunStarted(starting.resume(folder)))
        except VramwiseError as error:
            self.post_message(self.NotResumed(str(error)))

    @on(NotResumed)
    def _say_not_resumed(self, event: NotResumed) -> None:
        self.notify(plain(event.message), title="It cannot go on", severity="error", markup=False)

    def follow(self, folder: RunFolder) -> None:
        """Show a run; a run screen that is open gives way to it."""
        self._followed[folder.path] = folder
        if isinstance(self.screen, RunScreen):
            self.pop_screen()
        self.push_screen(RunScreen(folder))

    def _handle_signals(self) -> None:
        """End in order on SIGTERM and SIGHUP, so that the terminal is restored."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end_by_signal, number)

    def _end_by_signal(self, number: int) -> None:
        # Leaving through exit() lets the driver undo its terminal modes.
        self.exit(return_code=128 + number)
