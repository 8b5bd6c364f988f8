"""The keys of a screen, its own first, and where the numbers on it come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from launcher.tui.explained import Explained
from launcher.tui.text import plain
from launcher.tui.themes import Colours, colours

_KEY, _TITLE, _FIGURE = 9, 24, 13
_TWO_COLUMNS = 72
_NAMES = {"question_mark": "?", "slash": "/", "escape": "esc", "space": "space"}


class Help(ModalScreen[None]):
    """Shows `keys`, pairs of key and what it does, and the numbers of a screen, narrowed by typing."""

    AUTO_FOCUS = "#help-filter"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark", "dismiss", "Back", id="help.back", tooltip="Back"),
        Binding("down", "scroll(1)", show=False, id="help.down", priority=True),
        Binding("up", "scroll(-1)", show=False, id="help.up", priority=True),
        Binding("pagedown", "scroll(10)", show=False, id="help.pagedown", priority=True),
        Binding("pageup", "scroll(-10)", show=False, id="help.pageup", priority=True),
    ]

    def __init__(self, keys: Iterable[tuple[str, str]], numbers: tuple[Explained, ...]) -> None:
        super().__init__()
        self._keys = tuple(keys)
        self._numbers = numbers

    def compose(self) -> ComposeResult:
        """Keys and numbers in one list."""
        with Vertical(id="help"):
            yield Static("", id="help-keys")
            field = Input(placeholder="type to find a number", id="help-filter", compact=True)
            field.display = bool(self._numbers)
            yield field
            with VerticalScroll(id="help-scroll", can_focus=False):
                yield Static("", id="help-numbers")

    def on_mount(self) -> None:
        """Draw both."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._draw()

    def on_resize(self) -> None:
        """Fit them into the new width."""
        self._draw()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show the numbers that hold what was typed."""
        event.stop()
        self._draw()

    def action_scroll(self, lines: int) -> None:
        """Move through the numbers."""
        self.query_one("#help-scroll").scroll_relative(y=lines, animate=False)

    def _draw(self) -> None:
        shown, width = colours(self.app), self.query_one("#help-keys").size.width
        self.query_one("#help-keys", Static).update(keys_text(self._keys, width, shown))
        wanted = self.query_one("#help-filter", Input).value.lower()
        found = [one for one in self._numbers if wanted in f"{one.title} {one.source}".lower()]
        self.query_one("#help-numbers", Static).update(numbers_text(found, width, shown))


def keys_text(keys: tuple[tuple[str, str], ...], width: int, shown: Colours) -> Text:
    """Keys in one column, or two where there is room."""
    columns = 2 if width >= _TWO_COLUMNS else 1
    rows = -(-len(keys) // columns)
    cell = width // columns
    text = Text(no_wrap=True, overflow="ellipsis").append("Keys\n", f"bold {shown.primary}")
    for row in range(rows):
        for key, does in keys[row::rows]:
            name = _NAMES.get(key, key)
            text.append(f"{name:<{_KEY}}", f"bold {shown.primary}")
            text.append(plain(does, cell - _KEY - 1).ljust(cell - _KEY))
        text.append("\n")
    text.rstrip()
    return text


def numbers_text(numbers: list[Explained], width: int, shown: Colours) -> Text:
    """Each number with where it comes from, below it where the window is narrow."""
    text = Text()
    if not numbers:
        return text
    text.append("Where the numbers come from\n", f"bold {shown.primary}")
    for one in numbers:
        text.append(plain(one.title, _TITLE - 1).ljust(_TITLE))
        text.append(plain(one.figure, 60).rjust(_FIGURE) + "\n", "bold")
        text.append(f"  {plain(one.source)}\n", shown.muted)
    text.rstrip()
    return text
