"""A modal list to pick from, narrowed by typing."""

from __future__ import annotations

import re
from collections.abc import Callable
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

from launcher.tui.text import plain
from launcher.tui.themes import colours

_REMARK_WIDTH = 19
_SEPARATORS = re.compile(r"[\s_\-./]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing to pick: what is returned, its name, and what to search in beside the name."""

    key: str
    name: str
    detail: str = ""
    search: str = ""


@dataclass(frozen=True, slots=True)
class Remark:
    """What is said about a row once it has been worked out: a text and the theme colour it is shown in."""

    text: str
    colour: str


class Picker(ModalScreen[str | None]):
    """Returns the key of the picked row, or what was typed when no row matches, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss_none", "Back", id="picker.back", tooltip="Pick nothing"),
        Binding("down", "move(1)", "Down", show=False, id="picker.down", priority=True),
        Binding("up", "move(-1)", "Up", show=False, id="picker.up", priority=True),
        Binding("pagedown", "move(10)", "Page down", show=False, id="picker.pagedown", priority=True),
        Binding("pageup", "move(-10)", "Page up", show=False, id="picker.pageup", priority=True),
    ]

    class Remarked(Message):
        """Remarks have been worked out."""

        def __init__(self, remarks: tuple[tuple[str, Remark], ...]) -> None:
            super().__init__()
            self.remarks = remarks

    def __init__(
        self,
        title: str,
        rows: tuple[Row, ...],
        *,
        current: str,
        prompt: str,
        remark: Callable[[Row], Remark] | None = None,
    ) -> None:
        super().__init__()
        self._title = title
        self._rows = rows
        self._current = current
        self._prompt = prompt
        self._remark = remark
        self._remarks: dict[str, Remark] = {}
        self._shown: tuple[Row, ...] = rows
        self._name_width = min(26, max((len(row.name) for row in rows), default=10))

    def compose(self) -> ComposeResult:
        """Title, filter, list."""
        with Vertical(id="picker"):
            yield Label(self._title, id="picker-title")
            yield Input(placeholder=self._prompt, id="filter", compact=True, max_length=4096)
            yield OptionList(id="rows", compact=True)
            yield Static("", id="picker-hint", classes="note")

    def on_mount(self) -> None:
        """Show all rows and start working out the remarks."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._show_lines())
        self._fill("")
        if self._remark is not None:
            self._work_out(self._remark)

    @on(Input.Changed, "#filter")
    def _narrow(self, event: Input.Changed) -> None:
        event.stop()
        self._fill(event.value)

    @on(Input.Submitted, "#filter")
    def _submit(self, event: Input.Submitted) -> None:
        event.stop()
        highlighted = self.query_one(OptionList).highlighted
        if self._shown and highlighted is not None:
            self.dismiss(self._shown[highlighted].key)
        elif event.value.strip():
            self.dismiss(event.value.strip())

    @on(OptionList.OptionSelected)
    def _select(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._shown[event.option_index].key)

    @on(Remarked)
    def _show_remarks(self, event: Remarked) -> None:
        self._remarks.update(event.remarks)
        self._show_lines()

    def _show_lines(self) -> None:
        rows = self.query_one(OptionList)
        for index, row in enumerate(self._shown):
            rows.replace_option_prompt_at_index(index, self._line(row))

    def action_move(self, count: int) -> None:
        """Move the highlight while the filter keeps the focus."""
        rows = self.query_one(OptionList)
        if self._shown:
            rows.highlighted = min(len(self._shown) - 1, max(0, (rows.highlighted or 0) + count))

    def action_dismiss_none(self) -> None:
        """Leave without picking."""
        self.dismiss(None)

    @work(thread=True, exclusive=True, group="remarks")
    def _work_out(self, remark: Callable[[Row], Remark]) -> None:
        worker = get_current_worker()
        found: list[tuple[str, Remark]] = []
        for row in self._rows:
            if worker.is_cancelled:
                return
            found.append((row.key, remark(row)))
        self.post_message(self.Remarked(tuple(found)))

    def _fill(self, typed: str) -> None:
        words = [part for part in _SEPARATORS.split(typed.lower()) if part]
        self._shown = tuple(row for row in self._rows if _matches(row, words))
        rows = self.query_one(OptionList)
        rows.clear_options()
        rows.add_options([Option(self._line(row)) for row in self._shown])
        keys = [row.key for row in self._shown]
        rows.highlighted = (
            (keys.index(self._current) if self._current in keys and not words else 0) if keys else None
        )
        hint = f"{len(keys)} of {len(self._rows)} · ↑↓ move, enter picks, esc leaves"
        self.query_one("#picker-hint", Static).update(
            Text(hint if keys else f"no match; enter takes {plain(typed.strip(), 40)!r} as typed")
        )

    def _line(self, row: Row) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(plain(row.name, self._name_width).ljust(self._name_width + 2))
        shown = colours(self.app)
        if self._remark is not None:
            remark = self._remarks.get(row.key, Remark("", "muted"))
            line.append(remark.text.ljust(_REMARK_WIDTH) + "  ", shown.named(remark.colour))
        if row.detail:
            line.append(plain(row.detail, 60), shown.muted)
        return line


def _matches(row: Row, words: list[str]) -> bool:
    """Whether every typed word is in the row's name or search text, separators aside."""
    where = _SEPARATORS.sub("", f"{row.name} {row.detail} {row.search}".lower())
    return all(word in where for word in words)
