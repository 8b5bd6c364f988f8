"""Asks for data: a path, completed as it is typed, or a name on the Hub; says what is wrong with a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from launcher.tui.dataset import Dataset, UnreadableDataError, completions, read_dataset
from launcher.tui.text import plain
from planner.base.errors import VramwiseError

_HINT = "↑↓ move, tab completes, enter takes, esc leaves"


@dataclass(frozen=True, slots=True)
class PickedData:
    """What was picked: data, or none."""

    data: Dataset | None


class DataPicker(ModalScreen[PickedData | None]):
    """Returns the data once it has been read; None when nothing is to change."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back", id="data.back", tooltip="Leave the data as it is"),
        Binding("ctrl+d", "no_data", "No data", id="data.none", tooltip="Size without data", priority=True),
        Binding("tab", "complete", "Complete", show=False, id="data.complete", priority=True),
        Binding("down", "move(1)", "Down", show=False, id="data.down", priority=True),
        Binding("up", "move(-1)", "Up", show=False, id="data.up", priority=True),
    ]

    class Found(Message):
        """Paths that go on from what was typed."""

        def __init__(self, text: str, paths: tuple[str, ...]) -> None:
            super().__init__()
            self.text = text
            self.paths = paths

    class Read(Message):
        """The data was read, or says what is wrong with it."""

        def __init__(self, data: Dataset | None, mistakes: tuple[str, ...]) -> None:
            super().__init__()
            self.data = data
            self.mistakes = mistakes

    def __init__(self, text: str, *, allow_network: bool) -> None:
        super().__init__()
        self._begins_with = text
        self._allow_network = allow_network
        self._paths: tuple[str, ...] = ()
        self._reading = False

    def compose(self) -> ComposeResult:
        """Field, completions, mistakes."""
        with Vertical(id="picker"):
            yield Label("Data to train on", id="picker-title")
            yield Input(
                self._begins_with,
                placeholder="a file, a folder of shards, or org/name of the Hub",
                id="filter",
                compact=True,
                max_length=4096,
                select_on_focus=False,
            )
            yield Static("", id="data-mistakes", classes="knob-error")
            yield OptionList(id="rows", compact=True)
            yield Static(Text(_HINT), id="picker-hint", classes="note")

    def on_mount(self) -> None:
        """Look for paths."""
        self._look(self._begins_with)

    @on(Input.Changed, "#filter")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self.query_one("#data-mistakes", Static).remove_class("shown")
        self._look(event.value)

    @work(thread=True, exclusive=True, group="paths")
    def _look(self, text: str) -> None:
        """List a folder, which may lie on a slow disk."""
        found = completions(text)
        if not get_current_worker().is_cancelled:
            self.post_message(self.Found(text, found))

    @on(Found)
    def _show_paths(self, event: Found) -> None:
        event.stop()
        if event.text != self.query_one("#filter", Input).value:
            return
        self._paths = event.paths
        rows = self.query_one(OptionList)
        rows.clear_options()
        rows.add_options([Option(Text(plain(path, 300), no_wrap=True)) for path in event.paths])
        exact = event.text in event.paths
        rows.highlighted = (event.paths.index(event.text) if exact else 0) if event.paths else None

    @on(Input.Submitted, "#filter")
    def _submit(self, event: Input.Submitted) -> None:
        event.stop()
        text, path = event.value.strip(), self._highlighted
        self._take(path if path is not None and path.startswith(text) else text)

    @on(OptionList.OptionSelected)
    def _select(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._take(self._paths[event.option_index])

    @property
    def _highlighted(self) -> str | None:
        at = self.query_one(OptionList).highlighted
        return self._paths[at] if self._paths and at is not None else None

    def _take(self, text: str) -> None:
        """Go into a folder of other things; read what may be data."""
        field = self.query_one("#filter", Input)
        if text.endswith("/") and completions(text) and text != field.value:
            self._put(text)
            return
        if text and not self._reading:
            self._put(text)
            self._reading = True
            self.query_one("#picker-hint", Static).update(Text(f"reading {plain(text, 200)} ..."))
            self._read(text)

    def _put(self, text: str) -> None:
        field = self.query_one("#filter", Input)
        field.value = text
        field.action_end()
        field.focus()

    @work(thread=True, group="read")
    def _read(self, text: str) -> None:
        try:
            self.post_message(self.Read(read_dataset(text, allow_network=self._allow_network), ()))
        except UnreadableDataError as error:
            self.post_message(self.Read(None, error.mistakes))
        except VramwiseError as error:
            self.post_message(self.Read(None, (str(error),)))

    @on(Read)
    def _take_data(self, event: Read) -> None:
        event.stop()
        self._reading = False
        if event.data is not None:
            self.dismiss(PickedData(event.data))
            return
        self.query_one("#picker-hint", Static).update(Text(_HINT))
        place = self.query_one("#data-mistakes", Static)
        place.update(Text("\n".join(f"✘ {plain(mistake, 300)}" for mistake in event.mistakes)))
        place.add_class("shown")

    def action_complete(self) -> None:
        """Take the highlighted path into the field."""
        if self._highlighted is not None:
            self._put(self._highlighted)

    def action_move(self, count: int) -> None:
        """Move the highlight while the field keeps the focus."""
        rows = self.query_one(OptionList)
        if self._paths:
            rows.highlighted = min(len(self._paths) - 1, max(0, (rows.highlighted or 0) + count))

    def action_no_data(self) -> None:
        """Go on without data."""
        self.dismiss(PickedData(None))

    def action_leave(self) -> None:
        """Change nothing."""
        self.dismiss(None)
