"""Changes that would help, each of which can be applied."""

from __future__ import annotations

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from launcher.tui.advice import Change
from launcher.tui.sizing import Sizing, Verdict
from launcher.tui.text import gib, plain
from planner.training_setup import TrainingSetup

_FIGURES = 10 + 7
_LEAST_TITLE, _MOST_TITLE = 16, 60


class AdvicePanel(Vertical):
    """A summary and a list; enter on a line posts Applied with its setup."""

    DEFAULT_CSS = "AdvicePanel { height: auto; } AdvicePanel > OptionList { height: auto; }"

    class Applied(Message):
        """A change is to be made."""

        def __init__(self, setup: TrainingSetup) -> None:
            super().__init__()
            self.setup = setup

    def __init__(self) -> None:
        super().__init__()
        self._now: Sizing | None = None
        self._changes: tuple[Change, ...] = ()

    def compose(self) -> ComposeResult:
        """The summary over the list."""
        yield Static("", id="advice-summary", classes="note")
        yield OptionList(id="advice-list", compact=True)

    def show(self, now: Sizing, found: tuple[Change, ...]) -> None:
        """Show the changes that were found for a sizing."""
        self._now, self._changes = now, found
        self.query_one("#advice-summary", Static).update(Text(_summary(now, found)))
        self._fill()

    def on_resize(self) -> None:
        """Fit the lines to the new width."""
        self._fill()

    def _fill(self) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        if self._now is not None:
            options.add_options([Option(self._line(self._now, change)) for change in self._changes])
        options.display = bool(self._changes)

    @on(OptionList.OptionSelected)
    def _apply(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        setup = self._changes[event.option_index].setup
        if setup is not None:
            self.post_message(self.Applied(setup))

    def _line(self, now: Sizing, change: Change) -> Text:
        colours = self.app.theme_variables
        width = max(_LEAST_TITLE, min(_MOST_TITLE, self.content_size.width - _FIGURES))
        title = f"{change.title} ({change.effect})" if change.effect else change.title
        shown = title if len(title) < width else change.title
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(plain(shown, width - 1).ljust(width))
        text.append(f"{gib(change.peak_upper_bytes):>10}", colours["success" if change.fits else "error"])
        if now.step is not None and change.tokens_per_second is not None:
            ratio = change.tokens_per_second / now.step.tokens_per_second - 1
            text.append(f" {ratio:+6.0%}", colours["muted"])
        return text


def _summary(now: Sizing, found: tuple[Change, ...]) -> str:
    if found:
        return "tab to it, enter applies; memory, speed"
    if now.verdict is Verdict.FITS:
        return "nothing that is modelled would use more of the card"
    return "no change helps: take a smaller model or a larger card"
