"""A one-line field for a number: digits edit it, left and right step through usual values."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.reactive import reactive
from textual.widgets import Input

from launcher.tui.knobs import Row, step

_STAY = frozenset({"backspace", "delete"})
"""Keys that edit a number without ending it."""


class NumberKnob(Input):
    """Takes digits only, so that letters stay free for the screen's keys; but within a number that is being
    typed a letter is a slip, of which "4k" keeps no settings: it is answered by a hint.
    """

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
        self._typing = False

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Whether a key edits the number, or is a slip within one."""
        return character is not None and (_edits(character) or self._slips(character))

    def _slips(self, character: str) -> bool:
        return self._typing and character.isalpha()

    async def _on_key(self, event: events.Key) -> None:
        character = event.character or ""
        if event.is_printable and not _edits(character):
            event.prevent_default()
            if self._slips(character):
                event.stop()
                hint = f"{self.row.label} is a number: enter ends it, then {character} is a key again"
                self.app.notify(hint, timeout=3, markup=False)
        else:
            self._typing = event.is_printable or (self._typing and event.key in _STAY)

    def _on_blur(self, event: events.Blur) -> None:
        self._typing = False
        super()._on_blur(event)

    def action_step(self, direction: int) -> None:
        """Go to the next usual value."""
        value = step(self.row, self.value.strip(), direction)
        if value is not None:
            self.value = value
            self.action_select_all()


def _edits(character: str) -> bool:
    return character in "0123456789.,"
