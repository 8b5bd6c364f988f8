"""A run's log: what the trainer printed, warnings of libraries folded, then the run's own lines; searched."""

from __future__ import annotations

import re
from collections.abc import Iterable

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import Input

from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import plain
from launcher.tui.themes import Colours, colours
from launcher.tui.widgets.run.log_lines import Line, LogLines

SHOWN_OUTPUT = 60
"""Lines of the trainer's output that are shown where nothing is searched."""
_SHOWN_WARNINGS = 5
_WARNING = re.compile(r"\b\w*Warning\b: |\bwarnings\.warn\(|\bWARNING\b|^\[transformers\]")


class LogTail(Vertical):
    """Stays at the end unless it was scrolled up; `search` shows the lines that hold a text."""

    BINDINGS = [Binding("escape", "end_search", show=False)]  # noqa: RUF012 - as Textual has it

    def __init__(self) -> None:
        super().__init__()
        self._snapshot: RunSnapshot | None = None
        self._wanted = ""
        self._whole = False
        self._drawn: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """The search field over the lines."""
        yield Input(placeholder="search the log; enter keeps it, esc ends it", id="log-search", compact=True)
        yield LogLines(id="log-lines")

    def on_mount(self) -> None:
        """Draw the lines anew in another theme's colours."""
        self.query_one("#log-search").display = False
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw(anew=True))

    def show(self, snapshot: RunSnapshot) -> None:
        """Show a snapshot."""
        self._snapshot = snapshot
        self._draw()

    def search(self) -> None:
        """Ask what to look for."""
        field = self.query_one("#log-search", Input)
        field.display = True
        field.focus()

    def toggle_warnings(self) -> None:
        """Show the warnings of libraries, or fold them."""
        self._whole = not self._whole
        self._draw(anew=True)

    def action_end_search(self) -> None:
        """Show all lines again."""
        field = self.query_one("#log-search", Input)
        field.value, field.display = "", False
        self._wanted = ""
        self.screen.set_focus(None)
        self._draw(anew=True)

    @on(Input.Changed, "#log-search")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._wanted = event.value
        self._draw(anew=True)

    @on(Input.Submitted, "#log-search")
    def _kept(self, event: Input.Submitted) -> None:
        event.stop()
        self.query_one(LogLines).focus()

    def _draw(self, *, anew: bool = False) -> None:
        snapshot = self._snapshot
        if snapshot is None:
            return
        key = snapshot.lines[-1:], snapshot.log_lines, snapshot.warning_count, snapshot.event_count
        if key == self._drawn and not anew:
            return
        self._drawn = key
        shown = colours(self.app)
        lines = (
            found(snapshot, self._wanted, shown)
            if self._wanted
            else log_lines(snapshot, shown, whole=self._whole)
        )
        self.query_one(LogLines).show(lines, end=bool(self._wanted))


def log_lines(snapshot: RunSnapshot, shown: Colours, *, whole: bool = False) -> list[Line]:
    """Output, the run's own lines, then the last warnings, so that they are in sight."""
    told, folded = (list(snapshot.log_lines), 0) if whole else unfolded(snapshot.log_lines)
    lines: list[Line] = [((plain(line), shown.muted),) for line in told[-SHOWN_OUTPUT:]]
    if folded:
        lines.append(((f"▸ {folded:,} lines of warnings of libraries: w shows them", shown.muted),))
    lines += [((plain(line), ""),) for line in snapshot.lines]
    recent = snapshot.warnings[-_SHOWN_WARNINGS:]
    if snapshot.warning_count > len(recent):
        lines.append(((f"{snapshot.warning_count - len(recent):,} earlier warnings", shown.warning),))
    lines += [((f"! {plain(message)}", shown.warning),) for message in recent]
    return lines or [(("nothing yet", shown.muted),)]


def unfolded(lines: Iterable[str]) -> tuple[list[str], int]:
    """Lines that are no warning of a library, and how many others there are: a warning's own and those
    indented below it, its source.
    """
    kept: list[str] = []
    folded, within = 0, False
    for line in lines:
        within = bool(_WARNING.search(line)) or (within and line[:1] in " \t")
        folded += within
        if not within:
            kept.append(line)
    return kept, folded


def found(snapshot: RunSnapshot, wanted: str, shown: Colours) -> list[Line]:
    """The lines that hold a text, whatever its case, the text marked."""
    hits: list[Line] = []
    small, bold = wanted.casefold(), f"bold {shown.primary}"
    for line in (*snapshot.log_lines, *snapshot.lines, *(f"! {one}" for one in snapshot.warnings)):
        told = plain(line)
        at = told.casefold().find(small)
        if at < 0:
            continue
        end = at + len(wanted)
        hits.append(((told[:at], shown.muted), (told[at:end], bold), (told[end:], shown.muted)))
    count = len(hits)
    hits.append(((f"{count:,} line{'' if count == 1 else 's'} with {plain(wanted, 60)!r}", shown.warning),))
    return hits
