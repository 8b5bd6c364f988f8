"""What the panels of setups have in common: a note over a list, each line of which can be applied."""

from __future__ import annotations

from typing import Generic, TypeVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from launcher.tui.sizing import Sizing
from launcher.tui.text import FITS, TOO_BIG, plain
from planner.setup.training_setup import TrainingSetup

LEAST_TITLE, MOST_TITLE = 16, 68
WORDS_FROM = 60
"""Columns from which a line has room for the word beside the sign; the note says it where it has not."""

Item = TypeVar("Item")


class SetupList(Vertical, Generic[Item]):
    """A note and a list of items; enter on a line posts Applied with its setup, if it has one.

    `name_` is what the ids of note and list begin with.
    """

    DEFAULT_CSS = "SetupList { height: auto; } SetupList > OptionList { height: auto; }"
    name_ = ""

    class Applied(Message):
        """A setup is to be taken."""

        def __init__(self, setup: TrainingSetup) -> None:
            super().__init__()
            self.setup = setup

    def __init__(self) -> None:
        super().__init__()
        self._now: Sizing | None = None
        self._items: tuple[Item, ...] = ()

    def compose(self) -> ComposeResult:
        """The note over the list."""
        yield Static("", id=f"{self.name_}-summary", classes="note")
        yield OptionList(id=f"{self.name_}-list", compact=True)

    def show(self, now: Sizing, found: tuple[Item, ...], *, refusal: str = "") -> None:
        """Show what was found for a sizing, or why nothing could be looked for."""
        self._now, self._items = now, found
        note = plain(refusal) if refusal else self.note(now, found)
        self.query_one(f"#{self.name_}-summary", Static).update(Text(note))
        self._fill()

    def on_mount(self) -> None:
        """Draw the lines anew in another theme's colours."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._fill())

    def on_resize(self) -> None:
        """Fit the lines to the new width."""
        self._fill()

    def note(self, now: Sizing, found: tuple[Item, ...]) -> str:
        """What stands over the list."""
        raise NotImplementedError

    def line(self, now: Sizing, item: Item) -> Text:
        """One line of the list."""
        raise NotImplementedError

    def setup_of(self, item: Item) -> TrainingSetup | None:
        """What a line applies."""
        raise NotImplementedError

    def title_width(self, figures: int) -> int:
        """Room for a line's title beside so many columns of figures and the sign of fitting."""
        return max(LEAST_TITLE, min(MOST_TITLE, self.content_size.width - figures - 1))

    def titled(self, title: str, *, fits: bool, figures: int) -> tuple[str, str]:
        """A title, and whether its setup fits: sign and word, or the sign alone where the title needs the
        room.
        """
        width = self.title_width(figures) + 1
        told = (FITS if fits else TOO_BIG).ljust(len(TOO_BIG))
        if self.content_size.width < WORDS_FROM or len(title) + 1 + len(told) > width:
            told = told[0]
        room = width - len(told)
        return plain(title, room - 1).ljust(room), told

    def _fill(self) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        if self._now is not None:
            options.add_options([Option(self.line(self._now, item)) for item in self._items])
        options.display = bool(self._items)

    @on(OptionList.OptionSelected)
    def _apply(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        setup = self.setup_of(self._items[event.option_index])
        if setup is not None:
            self.post_message(self.Applied(setup))
