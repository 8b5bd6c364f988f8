"""A one-line field that shows what is picked and opens a list."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget


class PickButton(Widget, can_focus=True):
    """Shows a value; enter or a click asks for another."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,space,right", "press", "Pick", show=False, id="pick.open"),
        Binding("up", "app.focus_previous", "Previous", show=False, id="pick.previous"),
        Binding("down", "app.focus_next", "Next", show=False, id="pick.next"),
    ]
    DEFAULT_CSS = "PickButton { height: 1; }"

    value: reactive[str] = reactive("")

    class Pressed(Message):
        """Another value is wanted."""

        def __init__(self, button: PickButton) -> None:
            super().__init__()
            self.button = button

        @property
        def control(self) -> PickButton:
            """The button."""
            return self.button

    def render(self) -> Text:
        """The value, cut before the arrow."""
        width = max(4, self.content_size.width)
        name = self.value if len(self.value) <= width - 2 else self.value[: width - 3] + "…"
        return Text(name.ljust(width - 2) + " ▼", no_wrap=True)

    def on_click(self, event: events.Click) -> None:
        """Open on a click."""
        event.stop()
        self.action_press()

    def action_press(self) -> None:
        """Ask for another value."""
        self.post_message(self.Pressed(self))
