"""Advices that would help, each of which can be applied."""

from __future__ import annotations

from rich.text import Text

from launcher.tui.sizing import Sizing, Verdict
from launcher.tui.text import FITS, TOO_BIG, gib
from launcher.tui.themes import colours
from launcher.tui.widgets.sizing.setup_list import SetupList
from planner.answers.plan import Advice
from planner.setup.training_setup import TrainingSetup

_FIGURES = 10 + 7


class AdvicePanel(SetupList[Advice]):
    """A summary and a list of changes."""

    name_ = "advice"

    def note(self, now: Sizing, found: tuple[Advice, ...]) -> str:
        """What the list is, or why it is empty."""
        if found:
            return f"{FITS}, {TOO_BIG}; enter applies"
        if now.verdict is Verdict.FITS:
            return "nothing that is modelled would use more of the card"
        return "no change helps: take a smaller model or a larger card"

    def setup_of(self, item: Advice) -> TrainingSetup | None:
        """The changed setup; a change outside of it has none."""
        return item.setup

    def line(self, now: Sizing, item: Advice) -> Text:
        """The change, its memory and what it does to speed."""
        drawn = colours(self.app)
        more = ", ".join(item.changes) or item.effect
        title = f"{item.title} ({more})" if more else item.title
        # What else changes is said as far as there is room; an effect only where there is.
        fitting = item.changes or len(title) < self.title_width(_FIGURES)
        shown = title if fitting else item.title
        titled, told = self.titled(shown, fits=item.fits, figures=_FIGURES)
        text = Text(titled, no_wrap=True, overflow="ellipsis")
        text.append(f"{told}{gib(item.peak_upper_bytes):>10}", drawn.success if item.fits else drawn.error)
        if now.step is not None and item.tokens_per_second is not None:
            ratio = item.tokens_per_second / now.step.tokens_per_second - 1
            text.append(f" {ratio:+6.0%}", drawn.muted)
        return text
