"""A line of text that changes without the screen being laid out anew, as a Static would have it."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget


class TextLine(Widget):
    """One line, cut at the widget's width."""

    DEFAULT_CSS = "TextLine { height: 1; }"

    text: reactive[Text] = reactive(Text(""))

    def render(self) -> Text:
        """The line."""
        return self.text
