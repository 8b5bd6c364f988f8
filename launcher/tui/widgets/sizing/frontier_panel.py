"""Speed against memory: the best setups that the planner's search tried, each of which can be applied."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import OptionList

from launcher.tui.sizing import Sizing
from launcher.tui.text import GIB
from launcher.tui.themes import colours
from launcher.tui.widgets.sizing.frontier_plot import LEAST_COLUMNS, Frontier, FrontierPlot
from launcher.tui.widgets.sizing.setup_list import SetupList
from planner.answers.plan import FrontierPoint
from planner.setup.training_setup import TrainingSetup

_FIGURES = 7 + 8


class FrontierPanel(SetupList[FrontierPoint]):
    """A plot where there is room, and a list by rising memory, the planner's choice marked. Left and right
    walk along the points, and the setup follows.
    """

    name_ = "frontier"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "walk(-1)", show=False, id="frontier.less", tooltip="The next smaller setup"),
        Binding("right", "walk(1)", show=False, id="frontier.more", tooltip="The next larger setup"),
    ]

    def compose(self) -> ComposeResult:
        """The plot over note and list."""
        yield FrontierPlot()
        yield from super().compose()

    def _fill(self) -> None:
        """The cursor begins on the present setup."""
        super()._fill()
        options = self.query_one(OptionList)
        setups = [item.setup for item in self._items]
        if self._now is not None and self._now.setup in setups:
            options.highlighted = setups.index(self._now.setup)
        self._draw(options.highlighted)

    @on(OptionList.OptionHighlighted)
    def _mark(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        self._draw(event.option_index)

    def _draw(self, marked: int | None) -> None:
        plot, now = self.query_one(FrontierPlot), self._now
        plot.display = self.content_size.width >= LEAST_COLUMNS and len(self._items) > 1
        if now is not None:
            plot.data = Frontier(self._items, now.card.usable_bytes, marked)

    def action_walk(self, by: int) -> None:
        """Go to the next point in a direction, and take its setup."""
        at = self.query_one(OptionList).highlighted
        to = (0 if at is None else at) + by
        if 0 <= to < len(self._items):
            self.query_one(OptionList).highlighted = to
            self.post_message(self.Applied(self._items[to].setup))

    def note(self, now: Sizing, found: tuple[FrontierPoint, ...]) -> str:
        """What the list is, or why it is empty."""
        return (
            "▸ now ★ auto, enter takes, ← → walk; GiB, tokens/s"
            if found
            else "no forecast of speed for this card"
        )

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
