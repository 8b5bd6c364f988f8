"""Shown while a model is described, which takes seconds for one outside the catalog."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from launcher.runs.report.stages import seconds
from launcher.tui.text import plain
from planner.base.errors import VramwiseError
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

TICK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What sizing opens on, once `read`, which may take long and raises VramwiseError, has described the
    model that is called `name`.
    """

    name: str
    read: Callable[[], tuple[ModelSpec, TrainingSetup]]


class Reading(Screen[tuple[ModelSpec, TrainingSetup] | str]):
    """Returns model and setup, or why there are none."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.quit", "Quit", id="reading.quit", tooltip="Leave"),
    ]

    class Done(Message):
        """The model has been described, or says why not."""

        def __init__(self, found: tuple[ModelSpec, TrainingSetup] | str) -> None:
            super().__init__()
            self.found = found

    def __init__(self, opening: Opening) -> None:
        super().__init__()
        self._opening = opening
        self._since = time.monotonic()

    def compose(self) -> ComposeResult:
        """What is read, and for how long."""
        with Vertical(id="headline"):
            yield Static("", id="reading")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin."""
        self._tick()
        self.set_interval(TICK_SECONDS, self._tick)
        self._read()

    def _tick(self) -> None:
        since = seconds(time.monotonic() - self._since)
        told = Text(f"reading the model {plain(self._opening.name, 200)}, {since}")
        self.query_one("#reading", Static).update(told)

    @work(thread=True, group="reading")
    def _read(self) -> None:
        try:
            self.post_message(self.Done(self._opening.read()))
        except VramwiseError as error:
            self.post_message(self.Done(str(error)))

    @on(Done)
    def _end(self, event: Done) -> None:
        event.stop()
        self.dismiss(event.found)
