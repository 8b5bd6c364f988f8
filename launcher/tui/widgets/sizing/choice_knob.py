"""A one-line field for one of a few values: left and right step, enter opens the list."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widgets import Select, Static

from launcher.tui.knobs import Row, step


class ChoiceKnob(Select[str], inherit_bindings=False):
    """A compact select whose up and down keys move between knobs, as in the other fields."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Previous value", show=False, id="choice.less"),
        Binding("right", "step(1)", "Next value", show=False, id="choice.more"),
        Binding("up", "app.focus_previous", "Previous", show=False, id="choice.previous"),
        Binding("down", "app.focus_next", "Next", show=False, id="choice.next"),
        Binding("enter,space", "show_overlay", "Open the list", show=False, id="choice.open"),
    ]

    def __init__(self, row: Row, value: str) -> None:
        super().__init__(
            [(choice, choice) for choice in row.choices],
            value=value,
            allow_blank=False,
            compact=True,
            id=f"knob-{row.field}",
            tooltip=row.help,
        )
        self.row = row

    def on_mount(self) -> None:
        """Lay nothing out anew at a change: the width of a knob's field does not depend on its text."""
        label = self.query_one("#label", Static)
        label.update = partial(label.update, layout=False)  # type: ignore[method-assign]

    def action_step(self, direction: int) -> None:
        """Go to the next value of the list."""
        value = step(self.row, str(self.value), direction)
        if value is not None:
            self.value = value
