"""All knobs, one a line, each with room for a message under it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Label, Select, Static

from launcher.tui.cards import Card
from launcher.tui.knobs import ASKED, ROWS, Row
from launcher.tui.text import plain
from launcher.tui.widgets.sizing.choice_knob import ChoiceKnob
from launcher.tui.widgets.sizing.number_knob import NumberKnob
from launcher.tui.widgets.sizing.pick_button import PickButton
from launcher.tui.widgets.sizing.text_knob import TextKnob


class KnobForm(Vertical):
    """Model, GPU and knobs. Posts Changed with the text of every knob; shows errors where they belong."""

    class Changed(Message):
        """A knob has a new text."""

        def __init__(self, texts: Mapping[str, str]) -> None:
            super().__init__()
            self.texts = texts

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__(id="form")
        self._texts = dict(texts)
        self._error_shown = False
        self._others = ""
        self._knobs: dict[str, Widget] = {}

    def compose(self) -> ComposeResult:
        """Model, GPU and data with what is asked beside them, then the knobs."""
        display, price, epochs = ASKED
        yield from self._pick("model", "model")
        yield from self._pick("gpu", "GPU")
        yield from self._row(display)
        yield from self._row(price)
        yield from self._pick("data", "data")
        yield from self._row(epochs)
        for row in ROWS:
            if row.group:
                yield Static(row.group, classes="knob-group")
            yield from self._row(row)
        yield Static("", id="error-form", classes="knob-error")
        yield Static("", id="other-fields", classes="note")

    def _pick(self, name: str, label: str) -> ComposeResult:
        with Horizontal(classes="knob-row picks"):
            yield Label(label, classes="knob-label")
            yield PickButton(id=f"pick-{name}")
        yield Static("", id=f"error-{name}", classes="knob-error")

    def _row(self, row: Row) -> ComposeResult:
        with Horizontal(classes="knob-row"):
            yield Label(row.label, classes="knob-label")
            yield self._control(row)
        yield Static("", id=f"error-{row.field}", classes="knob-error")

    def _control(self, row: Row) -> Input | ChoiceKnob:
        value = self._texts[row.field]
        if row.choices:
            return ChoiceKnob(row, value)
        if row.numeric:
            return NumberKnob(row, value)
        return TextKnob(row, value)

    @property
    def texts(self) -> dict[str, str]:
        """Text of every knob."""
        return dict(self._texts)

    def show_picks(self, *, model: str, gpu: str, data: str) -> None:
        """Show what is picked."""
        for name, value in (("model", model), ("gpu", gpu), ("data", data)):
            self.query_one(f"#pick-{name}", PickButton).value = plain(value)

    def show_card(self, card: Card) -> None:
        """Say what an empty price stands for; a display is asked about where the machine does not tell."""
        price = card.spec.price_usd_per_hour
        self.query_one("#knob-price", Input).placeholder = "not known" if price is None else f"{price:g}"
        self.query_one("#knob-display").disabled = card.argument is None

    def set_texts(self, texts: Mapping[str, str]) -> None:
        """Replace the text of every knob at once, as one change that posts nothing."""
        self._texts |= texts
        for row in (*ASKED, *ROWS):
            control = self.query_one(f"#knob-{row.field}")
            with control.prevent(Input.Changed, Select.Changed):
                if isinstance(control, ChoiceKnob | Input):
                    control.value = self._texts[row.field]
        self._adapt()

    def show_error(self, field: str | None, message: str) -> None:
        """Show one message, under its knob when it has one."""
        self.clear_errors()
        self._error_shown = True
        known = field is not None and bool(self.query(f"#error-{field}"))
        place = self.query_one(f"#error-{field if known else 'form'}", Static)
        place.update(Text(plain(message)))
        place.add_class("shown")
        for control in self.query(f"#knob-{field}") if known else ():
            control.add_class("invalid")

    def clear_errors(self) -> None:
        """Take all messages away."""
        if not self._error_shown:
            return
        self._error_shown = False
        for place in self.query(".knob-error.shown"):
            place.remove_class("shown")
        for control in self.query(".invalid"):
            control.remove_class("invalid")

    def show_other_fields(self, text: str) -> None:
        """Show fields that are set but have no knob."""
        if text == self._others:
            return
        self._others = text
        place = self.query_one("#other-fields", Static)
        place.update(Text(plain(text)))
        place.set_class(bool(text), "shown")

    def on_mount(self) -> None:
        """Bring placeholders and disabled knobs in line."""
        self._adapt()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Light up the label of the knob in focus."""
        if event.widget.parent is not None:
            event.widget.parent.add_class("focused")

    def on_descendant_blur(self, event: events.DescendantBlur) -> None:
        """Dim it again."""
        if event.widget.parent is not None:
            event.widget.parent.remove_class("focused")

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        if isinstance(event.input, NumberKnob | TextKnob):
            self._change(event.input.row.field, event.value)

    @on(Select.Changed)
    def _chosen(self, event: Select.Changed) -> None:
        event.stop()
        if isinstance(event.select, ChoiceKnob):
            self._change(event.select.row.field, str(event.value))

    def _change(self, field: str, text: str) -> None:
        if self._texts[field] == text:
            return
        self._texts[field] = text
        self._adapt()
        self.post_message(self.Changed(self.texts))

    def _knob(self, field: str) -> Widget:
        """A knob's widget, looked for once: at every key a dozen are asked for."""
        if field not in self._knobs:
            self._knobs[field] = self.query_one(f"#knob-{field}")
        return self._knobs[field]

    def _adapt(self) -> None:
        """Disable what the other knobs leave no meaning; say what empty fields stand for."""
        for row in ROWS:
            if row.unless:
                self._knob(row.field).disabled = not row.applies(self._texts)
        budget, alpha = self._knob("activation_memory_budget"), self._knob("lora_alpha")
        assert isinstance(budget, Input)
        assert isinstance(alpha, Input)
        budget.placeholder = "-" if budget.disabled else "all"
        rank = self._texts["lora_r"].strip()
        alpha.placeholder = (
            f"{2 * int(rank)} (2 x rank)" if rank.isdecimal() and len(rank) < 7 else "2 x rank"
        )
