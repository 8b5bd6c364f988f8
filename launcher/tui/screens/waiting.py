"""Waits for a GPU that another run has, or whose memory others hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Static
from textual.worker import get_current_worker

from launcher.runs.report.stages import seconds
from launcher.tui.text import plain

POLL_SECONDS = 1.0


class Waiting(ModalScreen[bool]):
    """Returns True once nothing is in the way any more, False when the person goes back before.

    `in_the_way` says what is, in a sentence, and None when nothing is; it is asked in a thread. On a low
    terminal the sentence scrolls, so that the way back is always seen.
    """

    VERTICAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = [(0, "-low"), (18, "-high")]  # type: ignore[misc]

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back", id="waiting.back", tooltip="Wait no longer; start nothing"),
        Binding("down", "scroll(1)", "Down", show=False, id="waiting.down", tooltip="Read on"),
        Binding("up", "scroll(-1)", "Up", show=False, id="waiting.up", tooltip="Read back"),
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
        self._since = time.monotonic()

    def _title(self) -> Text:
        return Text(f"Waiting for the GPU · {seconds(time.monotonic() - self._since)}", "bold")

    def compose(self) -> ComposeResult:
        """What is waited for, and the way back."""
        with Vertical(id="dialog"):
            yield Static(self._title(), id="dialog-title")
            with VerticalScroll(id="waiting-for", classes="dialog-text", can_focus=False):
                yield Static(_sentence(self._reason), id="waiting-reason")
            yield Static(Text("Training starts when it is free."), classes="dialog-text")
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
            self.query_one("#dialog-title", Static).update(self._title())
            self.query_one("#waiting-reason", Static).update(_sentence(event.reason))

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.action_back()

    def action_scroll(self, lines: int) -> None:
        """Read what is waited for where it has more lines than there is room."""
        self.query_one("#waiting-for", VerticalScroll).scroll_relative(y=lines, animate=False)

    def action_back(self) -> None:
        """Wait no longer."""
        self.workers.cancel_group(self, "waiting")
        self.dismiss(False)


def _sentence(reason: str) -> Text:
    words = plain(reason)
    return Text(words[:1].upper() + words[1:])
