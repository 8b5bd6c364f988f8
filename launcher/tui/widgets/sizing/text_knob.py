"""A one-line field for names."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.reactive import reactive
from textual.widgets import Input

from launcher.tui.knobs import Row, step


class TextKnob(Input):
    """Takes text; left and right step through usual values while one of them is shown."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Previous value", show=False, id="text.less"),
        Binding("right", "step(1)", "Next value", show=False, id="text.more"),
        Binding("up", "app.focus_previous", "Previous", show=False, id="text.previous"),
        Binding("down,enter", "app.focus_next", "Next", show=False, id="text.next"),
    ]

    # Input lays the screen out anew at every letter; the width of a knob's field does not depend on its text.
    value: reactive[str] = reactive("", init=False)

    def __init__(self, row: Row, value: str) -> None:
        super().__init__(value, id=f"knob-{row.field}", compact=True, max_length=400, tooltip=row.help)
        self.row = row

    def action_step(self, direction: int) -> None:
        """Step while the value is one of the usual ones or all of it is selected; else move the cursor."""
        whole = self.selection.start == 0 and self.selection.end == len(self.value)
        value = step(self.row, self.value.strip(), direction)
        if value is not None and (self.value in self.row.steps or whole):
            self.value = value
            self.action_select_all()
        elif direction < 0:
            self.action_cursor_left()
        else:
            self.action_cursor_right()
