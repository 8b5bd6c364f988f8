"""Waits for a GPU that another run has, or whose memory others hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Static
from textual.worker import get_current_worker

from launcher.tui.text import plain

POLL_SECONDS = 1.0


class Waiting(ModalScreen[bool]):
    """Returns True once nothing is in the way any more, False when the person goes back before.

    `in_the_way` says what is, in a sentence, and None when nothing is; it is asked in a thread.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back", id="waiting.back", tooltip="Wait no longer; start nothing"),
    ]

    class Looked(Message):
        """What is in the way now, or None."""

        def __init__(self, reason: str | None) -> None:
            super().__init__()
            self.reason = reason

    def __init__(self, reason: str, in_the_way: Callable[[], str | None]) -> None:
        super().__init__()
        self._reason = reason
        self._in_the_way = in_the_way

    def compose(self) -> ComposeResult:
        """What is waited for, and the way back."""
        with Vertical(id="dialog"):
            yield Static(Text("Waiting for the GPU", "bold"), id="dialog-title")
            yield Static(Text(plain(self._reason)), id="waiting-reason", classes="dialog-text")
            yield Static(Text("The run starts when it is free."), classes="dialog-text")
            with Horizontal(classes="dialog-buttons"):
                yield Button("Back (esc)", id="back", compact=True)

    def on_mount(self) -> None:
        """Begin to look."""
        self._look()

    @work(thread=True, group="waiting")
    def _look(self) -> None:
        worker = get_current_worker()
        while not worker.is_cancelled:
            reason = self._in_the_way()
            self.post_message(self.Looked(reason))
            if reason is None:
                return
            time.sleep(POLL_SECONDS)

    @on(Looked)
    def _show(self, event: Looked) -> None:
        event.stop()
        if event.reason is None:
            self.dismiss(True)
        else:
            self.query_one("#waiting-reason", Static).update(Text(plain(event.reason)))

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.action_back()

    def action_back(self) -> None:
        """Wait no longer."""
        self.workers.cancel_group(self, "waiting")
        self.dismiss(False)
