"""Speed against memory: the best setups that the planner's search tried, each of which can be applied."""

from __future__ import annotations

from rich.text import Text

from launcher.tui.sizing import Sizing
from launcher.tui.text import GIB, plain
from launcher.tui.themes import colours
from launcher.tui.widgets.setup_list import SetupList
from planner.answers.plan import FrontierPoint
from planner.setup.training_setup import TrainingSetup

_FIGURES = 7 + 8


class FrontierPanel(SetupList[FrontierPoint]):
    """A list by rising memory, the planner's choice marked."""

    name_ = "frontier"

    def note(self, now: Sizing, found: tuple[FrontierPoint, ...]) -> str:
        """What the list is, or why it is empty."""
        return "▸ now ★ auto, enter takes; GiB, tokens/s" if found else "no forecast of speed for this card"

    def setup_of(self, item: FrontierPoint) -> TrainingSetup | None:
        """The point's setup."""
        return item.setup

    def line(self, now: Sizing, item: FrontierPoint) -> Text:
        """The strategy, its memory and its speed."""
        shown, setup, width = colours(self.app), item.setup, self.title_width(_FIGURES)
        mark = "▸ " if setup == now.setup else "★ " if item.chosen and item.fits else "  "
        batch = f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(mark, shown.primary)
        text.append(plain(f"{batch} {item.strategy}", width - 3).ljust(width - 2))
        figure = f"{self.told(fits=item.fits)}{item.peak_upper_bytes / GIB:>7,.1f}"
        text.append(figure, shown.success if item.fits else shown.error)
        return text.append(f"{item.tokens_per_second:>8,.0f}", shown.muted)
