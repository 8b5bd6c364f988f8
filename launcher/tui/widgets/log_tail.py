"""The end of the trainer's log, warnings first."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import plain
from launcher.tui.themes import colours

_SHOWN_WARNINGS = 5


class LogTail(VerticalScroll):
    """Warnings and log lines; stays at the end unless it was scrolled up."""

    def __init__(self) -> None:
        super().__init__()
        self._snapshot: RunSnapshot | None = None

    def compose(self) -> ComposeResult:
        """One block of text."""
        yield Static("", id="log-text")

    def on_mount(self) -> None:
        """Draw the lines anew in another theme's colours."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._redraw())

    def _redraw(self) -> None:
        if self._snapshot is not None:
            self.show(self._snapshot)

    def show(self, snapshot: RunSnapshot) -> None:
        """Show a snapshot."""
        self._snapshot = snapshot
        at_end = self.max_scroll_y - self.scroll_y <= 1
        shown = colours(self.app)
        self.query_one("#log-text", Static).update(
            log_text(snapshot, warning=shown.warning, muted=shown.muted)
        )
        if at_end:
            self.scroll_end(animate=False)


def log_text(snapshot: RunSnapshot, *, warning: str, muted: str) -> Text:
    """Log lines, then the last warnings, so that they are in sight."""
    text = Text()
    for line in snapshot.log_lines:
        text.append(plain(line) + "\n", muted)
    recent = snapshot.warnings[-_SHOWN_WARNINGS:]
    if snapshot.warning_count > len(recent):
        text.append(f"{snapshot.warning_count - len(recent):,} earlier warnings\n", warning)
    for message in recent:
        text.append(f"! {plain(message)}\n", warning)
    if not text:
        text.append("nothing yet", muted)
    text.rstrip()
    return text
