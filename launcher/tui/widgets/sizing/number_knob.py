"""A one-line field for a number: digits edit it, left and right step through usual values."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.reactive import reactive
from textual.widgets import Input

from launcher.tui.knobs import Row, step


class NumberKnob(Input):
    """Takes digits only, so that letters stay free for the screen's keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "left", "step(-1)", "Less", show=False, id="knob.less", tooltip="The next smaller usual value"
        ),
        Binding(
            "right", "step(1)", "More", show=False, id="knob.more", tooltip="The next larger usual value"
        ),
        Binding("up", "app.focus_previous", "Previous", show=False, id="knob.previous"),
        Binding("down,enter", "app.focus_next", "Next", show=False, id="knob.next"),
    ]

    # Input lays the screen out anew at every letter; the width of a knob's field does not depend on its text.
    value: reactive[str] = reactive("", init=False)

    def __init__(self, row: Row, value: str, *, placeholder: str = "") -> None:
        super().__init__(
            value,
            id=f"knob-{row.field}",
            compact=True,
            placeholder=placeholder,
            restrict=r"[0-9.,eE+\-]*",
            max_length=14,
            tooltip=row.help,
        )
        self.row = row

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Whether a key edits the number."""
        return character is not None and _edits(character)

    async def _on_key(self, event: events.Key) -> None:
        if event.is_printable and not _edits(event.character or ""):
            event.prevent_default()

    def action_step(self, direction: int) -> None:
        """Go to the next usual value."""
        value = step(self.row, self.value.strip(), direction)
        if value is not None:
            self.value = value
            self.action_select_all()


def _edits(character: str) -> bool:
    return character in "0123456789.,"
