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

_TITLE_WIDTH = 21


class AdvicePanel(Vertical):
    """A heading line and a list; enter on a line posts Applied with its setup."""

    DEFAULT_CSS = "AdvicePanel { height: auto; } AdvicePanel > OptionList { height: auto; }"

    class Applied(Message):
        """A change is to be made."""

        def __init__(self, setup: TrainingSetup) -> None:
            super().__init__()
            self.setup = setup

    def __init__(self) -> None:
        super().__init__()
        self._changes: tuple[Change, ...] = ()

    def compose(self) -> ComposeResult:
        """The summary over the list."""
        yield Static("", id="advice-summary")
        yield OptionList(id="advice-list", compact=True)

    def show(self, now: Sizing, found: tuple[Change, ...]) -> None:
        """Show the changes that were found for a sizing."""
        self._changes = found
        self.query_one("#advice-summary", Static).update(Text(_summary(now, found)))
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(self._line(now, change)) for change in found])
        options.display = bool(found)

    @on(OptionList.OptionSelected)
    def _apply(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Applied(self._changes[event.option_index].sizing.setup))

    def _line(self, now: Sizing, change: Change) -> Text:
        colours = self.app.theme_variables
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(plain(change.title, _TITLE_WIDTH).ljust(_TITLE_WIDTH + 1))
        verdict = change.sizing.verdict
        colour = {Verdict.FITS: "success", Verdict.TIGHT: "warning", Verdict.DOES_NOT_FIT: "error"}[verdict]
        text.append(f"{gib(change.sizing.memory.peak_upper_bytes):>9}", colours[colour])
        if now.step is not None and change.sizing.step is not None:
            ratio = change.sizing.step.tokens_per_second / now.step.tokens_per_second - 1
            text.append(f" {ratio:+5.0%} tok/s", colours["muted"])
        return text


def _summary(now: Sizing, found: tuple[Change, ...]) -> str:
    if now.verdict is Verdict.FITS:
        return "to use what is left (enter applies):" if found else "nothing that is modelled would be faster"
    return (
        "to make it fit (enter applies):"
        if found
        else "no single change helps: a smaller model or larger card"
    )
