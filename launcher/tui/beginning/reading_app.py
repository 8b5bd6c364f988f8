"""What is on the screen while a model is described: drawn before the rest of the interface is imported.

The rest takes half a second of imports, which a thread does meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType

from launcher.tui.screens.reading import Opening, Reading
from launcher.tui.themes import DARK, LIGHT, completed
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

Found = tuple[ModelSpec, TrainingSetup] | str


class ReadingApp(App[Found]):
    """Returns the model and a setup of it, or why there are none; None where it was left."""

    CSS_PATH = Path(__file__).parents[1] / "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", id="app.quit", priority=True, tooltip="Leave"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, opening: Opening, *, theme: str | None) -> None:
        super().__init__()
        for one in (DARK, LIGHT):
            self.register_theme(one)
        # A name that is none is refused by the interface itself.
        self.theme = theme if theme in self.available_themes else DARK.name
        self._opening = opening
        self._left = False

    def get_css_variables(self) -> dict[str, str]:
        """The theme's variables, with those that this interface needs beside Textual's."""
        self.theme_variables = completed(self.current_theme, super().get_css_variables())
        return self.theme_variables

    def on_mount(self) -> None:
        """Show what is read, and read."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, partial(self.exit, return_code=128 + number))
        self.push_screen(Reading(self._opening), self._hand_on)
        self.set_timer(0.1, self._import_rest)

    async def action_quit(self) -> None:
        """Leave; what is read meanwhile opens nothing any more."""
        self._left = True
        await super().action_quit()

    def _hand_on(self, found: tuple[ModelSpec, TrainingSetup] | str | None) -> None:
        if not self._left:
            self.exit(found)

    @work(thread=True, group="imports")
    def _import_rest(self) -> None:
        importlib.import_module("launcher.tui.app")
