"""The runs as a table: sorted, filtered, opened, loaded into sizing, gone on with, compared, deleted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Static

from launcher.runs.folder import RunFolder
from launcher.runs.minding.removal import refuse_alive, remove
from launcher.tui import runs
from launcher.tui.run_rows import COLUMNS, RowReader, RunRow, sorted_rows
from launcher.tui.screens.compare_runs import CompareRuns
from launcher.tui.screens.confirm import Confirm
from launcher.tui.text import GIB, duration, number, plain
from launcher.tui.themes import Colours, colours
from planner.base.errors import InputError, VramwiseError

POLL_SECONDS = 2.0
_STATE_COLOURS = {"running": "primary", "finished": "success", "stopped": "warning"}
_NAME, _MODEL, _DATA = 28, 22, 20
_STARTED = next(index for index, column in enumerate(COLUMNS) if column.key == "started")


class RunsScreen(Screen[None]):
    """Reads the runs of a folder again and again; leaves them alone."""

    AUTO_FOCUS = "#runs-table"
    BINDINGS: ClassVar[list[BindingType]] = [
        # First, so that a narrow footer has it.
        Binding("question_mark", "app.help", "Help", id="runs.help", tooltip="Keys and sources of numbers"),
        Binding("slash", "filter", "Filter", id="runs.filter", tooltip="Show runs that hold a text"),
        Binding("s", "sort(1)", "Sort", id="runs.sort", tooltip="Sort by the next column"),
        Binding("S", "turn", show=False, id="runs.turn", tooltip="Turn the order"),
        Binding("space", "mark", "Mark", id="runs.mark", tooltip="Mark a run, to compare two"),
        Binding("c", "compare", "Compare", id="runs.compare", tooltip="Compare with the marked run"),
        Binding("l", "load", "Load", id="runs.load", tooltip="Load the run's setup into sizing"),
        Binding("r", "resume", "Resume", id="runs.resume", tooltip="Go on from the last checkpoint"),
        Binding("x", "delete", "Delete", id="runs.delete", tooltip="Delete a run that is over; asks"),
        Binding("a", "app.accuracy", "Accuracy", id="runs.accuracy", tooltip="Predicted beside measured"),
        Binding("escape", "back", "Back", id="runs.back", tooltip="Back"),
    ]

    class Read(Message):
        """The rows as they are now."""

        def __init__(self, rows: tuple[RunRow, ...]) -> None:
            super().__init__()
            self.rows = rows

    class Deleted(Message):
        """A run was deleted, or says why not."""

        def __init__(self, name: str, message: str) -> None:
            super().__init__()
            self.name = name
            self.message = message

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self._reader = RowReader()
        self._rows: tuple[RunRow, ...] | None = None
        self._shown: list[RunRow] = []
        self._sort = _STARTED
        self._turned = False
        self._marked: Path | None = None
        self._reading = False

    def compose(self) -> ComposeResult:
        """Title, filter, table."""
        yield Static("", id="runs-title")
        yield Input(placeholder="a text, or the path of a run folder", id="runs-filter", compact=True)
        yield DataTable(id="runs-table", cursor_type="row", zebra_stripes=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Read the runs, and go on reading."""
        self.query_one("#runs-filter").display = False
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._draw()
        self._poll()
        self.set_interval(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        if not self._reading:
            self._reading = True
            self._read()

    @work(thread=True, group="read")
    def _read(self) -> None:
        found = [self._reader.read(folder) for folder in runs.list_runs(self._root)]
        self.post_message(self.Read(tuple(row for row in found if row is not None)))

    @on(Read)
    def _take_rows(self, event: Read) -> None:
        event.stop()
        self._reading = False
        if event.rows != self._rows:
            self._rows = event.rows
            self._draw()

    def _draw(self) -> None:
        """Draw the table anew, the cursor on the run it was on."""
        table = self.query_one(DataTable)
        on_it = self._current
        wanted = self.query_one("#runs-filter", Input).value.strip().lower()
        rows = [row for row in self._rows or () if _holds(row, wanted)]
        self._shown = sorted_rows(rows, COLUMNS[self._sort], turned=self._turned)
        shown = colours(self.app)
        lines = [_cells(row, shown, marked=row.folder.path == self._marked) for row in self._shown]
        table.clear(columns=True)
        for index, column in enumerate(COLUMNS):
            arrow = "" if index != self._sort else (" ▼" if column.largest_first != self._turned else " ▲")
            heading = Text(column.heading + arrow)
            # The table's own widths come a moment late.
            width = max(len(heading), *(len(cells[index]) for cells in lines), 0)
            table.add_column(heading, key=column.key, width=width)
        table.fixed_columns = 1 if self.size.width >= _NAME * 3 else 0
        for row, cells in zip(self._shown, lines, strict=True):
            table.add_row(*cells, key=str(row.folder.path))
        paths = [row.folder.path for row in self._shown]
        if on_it is not None and on_it.folder.path in paths:
            table.move_cursor(row=paths.index(on_it.folder.path), animate=False)
        self._say(len(rows), shown)

    def _say(self, count: int, shown: Colours) -> None:
        text = Text("Runs", f"bold {shown.primary}", no_wrap=True, overflow="ellipsis")
        if self._rows is None:
            text.append("  reading ...", shown.muted)
        elif not self._rows:
            text.append(f"  none in {plain(self._root, 200)} yet: t in sizing starts one", shown.muted)
        else:
            text.append(f"  {count:,} of {len(self._rows):,} in {plain(self._root, 200)}", shown.muted)
        self.query_one("#runs-title", Static).update(text)

    @property
    def _current(self) -> RunRow | None:
        at = self.query_one(DataTable).cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    @on(DataTable.RowSelected)
    def _open(self, event: DataTable.RowSelected) -> None:
        event.stop()
        if 0 <= event.cursor_row < len(self._shown):
            self.app.follow(self._shown[event.cursor_row].folder)  # type: ignore[attr-defined]

    @on(DataTable.HeaderSelected)
    def _sort_by(self, event: DataTable.HeaderSelected) -> None:
        event.stop()
        self._turned = not self._turned if event.column_index == self._sort else False
        self._sort = event.column_index
        self._draw()

    @on(Input.Changed, "#runs-filter")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._draw()

    @on(Input.Submitted, "#runs-filter")
    def _submitted(self, event: Input.Submitted) -> None:
        """Enter takes the run that the cursor is on; a path leads to a run elsewhere."""
        event.stop()
        row = self._current
        if row is not None:
            self.app.follow(row.folder)  # type: ignore[attr-defined]
        elif event.value.strip():
            self.app.follow_path(event.value.strip())  # type: ignore[attr-defined]

    def action_filter(self) -> None:
        """Ask what runs must hold."""
        field = self.query_one("#runs-filter", Input)
        field.display = True
        field.focus()

    def action_sort(self, by: int) -> None:
        """Sort by the next column."""
        self._sort, self._turned = (self._sort + by) % len(COLUMNS), False
        self._draw()

    def action_turn(self) -> None:
        """Turn the order."""
        self._turned = not self._turned
        self._draw()

    def action_mark(self) -> None:
        """Mark the run, or take the mark off it."""
        row = self._current
        if row is not None:
            self._marked = None if self._marked == row.folder.path else row.folder.path
            self._draw()

    def action_compare(self) -> None:
        """Compare the run with the marked one."""
        row = self._current
        other = next((one for one in self._rows or () if one.folder.path == self._marked), None)
        if row is None or other is None or other is row:
            self.notify("mark another run with space, then c", severity="warning", markup=False)
            return
        self.app.push_screen(CompareRuns(other, row))

    def action_load(self) -> None:
        """Take the run's setup and data to sizing."""
        row = self._current
        if row is None:
            return
        try:
            self.app.load_run(row.folder)  # type: ignore[attr-defined]
        except InputError as error:
            self.notify(plain(error), title="Not loaded", severity="error", markup=False)

    def action_resume(self) -> None:
        """Go on with the run."""
        if self._current is not None:
            self.app.resume_run(self._current.folder)  # type: ignore[attr-defined]

    def action_delete(self) -> None:
        """Ask, then delete."""
        row = self._current
        if row is None:
            return
        try:
            refuse_alive(row.folder)
        except InputError as error:
            self.notify(plain(error), title="Not deleted", severity="error", markup=False)
            return
        detail = (
            f"{row.status.state}, step {row.status.step:,}; its adapter and checkpoints go with it, for ever."
        )
        question = f"Delete {plain(row.name, 60)}?"

        def answered(yes: bool | None) -> None:
            if yes:
                self._delete(row.folder)

        self.app.push_screen(Confirm(question, detail, yes="Delete"), answered)

    @work(thread=True, group="delete")
    def _delete(self, folder: RunFolder) -> None:
        try:
            remove(folder)
        except VramwiseError as error:
            self.post_message(self.Deleted(folder.path.name, str(error)))
        else:
            self.post_message(self.Deleted(folder.path.name, ""))

    @on(Deleted)
    def _say_deleted(self, event: Deleted) -> None:
        event.stop()
        if event.message:
            self.notify(plain(event.message), title="Not deleted", severity="error", markup=False)
        else:
            self.notify(f"{plain(event.name, 60)} is deleted", markup=False)
        self._poll()

    def action_back(self) -> None:
        """End the filter; else leave."""
        field = self.query_one("#runs-filter", Input)
        if field.display:
            field.value, field.display = "", False
            self.query_one(DataTable).focus()
            self._draw()
        else:
            self.app.pop_screen()


def _holds(row: RunRow, wanted: str) -> bool:
    told = " ".join(filter(None, (row.name, row.model, row.data, row.method, row.status.state))).lower()
    return all(word in told for word in wanted.split())


def _cells(row: RunRow, shown: Colours, *, marked: bool) -> list[Text]:
    now = row.status
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.1f}"
    planned = "" if row.planned_peak_bytes is None else f" ({row.planned_peak_bytes / GIB:.1f})"
    return [
        Text(("● " if marked else "") + plain(row.name, _NAME), shown.accent if marked else ""),
        Text(plain(now.state, 12), shown.named(_STATE_COLOURS.get(now.state, "error"))),
        _number(f"{now.step:,}/{'?' if now.total_steps is None else f'{now.total_steps:,}'}"),
        _number(number(row.loss)),
        _number(number(row.evaluation)),
        _number(number(row.tokens_per_second)),
        _number(peak + planned),
        Text(_last(row.model, _MODEL)),
        Text(plain(row.method or "-", 8)),
        Text(_last(row.data, _DATA)),
        Text(_when(row.started), shown.muted),
        _number("-" if row.seconds is None else duration(row.seconds)),
    ]


def _number(text: str) -> Text:
    return Text(text, justify="right")


def _last(path: str | None, width: int) -> str:
    """Of a path the last name."""
    return "-" if path is None else plain(path.rstrip("/").split("/")[-1], width)


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    try:
        return time.strftime("%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-"
