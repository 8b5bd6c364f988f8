"""The terminal application: owns the screens, the themes and the signals."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from launcher.tui.cards import Card
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.sizing import Sizing
from launcher.tui.themes import DARK, LIGHT
from planner.model_spec import ModelSpec
from planner.training_setup import TrainingSetup


class VramwiseApp(App[None]):
    """Sizing first, or a run when a run folder is given."""

    TITLE = "vramwise"
    CSS_PATH = "app.tcss"
    HORIZONTAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = [
        (0, "-narrow"),
        (76, "-normal"),
        (118, "-wide"),
    ]
    VERTICAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = [(0, "-short"), (30, "-tall")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", id="app.quit", priority=True, tooltip="Leave; runs go on"),
    ]

    def __init__(
        self, *, model: ModelSpec, card: Card, setup: TrainingSetup, run: Path | None = None
    ) -> None:
        super().__init__()
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = DARK.name
        self._first = (model, card, setup)
        self._run = run

    def on_mount(self) -> None:
        """Show the first screen."""
        self._handle_signals()
        self.push_screen(SizingScreen(*self._first))

    def start_run(self, sizing: Sizing) -> None:
        """Ask what to train on and start."""

    def action_open_run(self) -> None:
        """Pick a run to follow."""

    def _handle_signals(self) -> None:
        """End in order on SIGTERM and SIGHUP, so that the terminal is restored; runs are not our children's children."""
        loop = asyncio.get_running_loop()
        end: Callable[[], None] = self.exit
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end)
