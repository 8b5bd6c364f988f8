"""Speed against memory: the best setups that the planner's search tried, each of which can be applied."""

from __future__ import annotations

from rich.text import Text

from launcher.tui.sizing import Sizing
from launcher.tui.text import GIB
from launcher.tui.themes import colours
from launcher.tui.widgets.sizing.setup_list import SetupList
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
        shown, setup = colours(self.app), item.setup
        mark = "▸ " if setup == now.setup else "★ " if item.chosen and item.fits else "  "
        batch = f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"
        titled, told = self.titled(f"{batch} {item.strategy}", fits=item.fits, figures=_FIGURES + len(mark))
        text = Text(no_wrap=True, overflow="ellipsis").append(mark, shown.primary).append(titled)
        text.append(
            f"{told}{item.peak_upper_bytes / GIB:>7,.1f}", shown.success if item.fits else shown.error
        )
        return text.append(f"{item.tokens_per_second:>8,.0f}", shown.muted)
