"""Speed against memory: the best setups that the planner's search tried, each of which can be applied."""

from __future__ import annotations

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from launcher.tui.sizing import Sizing
from launcher.tui.text import GIB, plain
from planner.plan import FrontierPoint
from planner.training_setup import TrainingSetup

_FIGURES = 7 + 8
_LEAST_TITLE, _MOST_TITLE = 16, 60


class FrontierPanel(Vertical):
    """A list by rising memory, the planner's choice marked; enter on a line posts Applied with its setup."""

    DEFAULT_CSS = "FrontierPanel { height: auto; } FrontierPanel > OptionList { height: auto; }"

    class Applied(Message):
        """A setup is to be taken."""

        def __init__(self, setup: TrainingSetup) -> None:
            super().__init__()
            self.setup = setup

    def __init__(self) -> None:
        super().__init__()
        self._now: Sizing | None = None
        self._points: tuple[FrontierPoint, ...] = ()

    def compose(self) -> ComposeResult:
        """The list, or why there is none."""
        yield Static("", id="frontier-summary", classes="note")
        yield OptionList(id="frontier-list", compact=True)

    def show(self, now: Sizing, found: tuple[FrontierPoint, ...]) -> None:
        """Show the frontier that was found for a sizing."""
        self._now, self._points = now, found
        words = "▸ now ★ auto, enter takes; GiB, tokens/s" if found else "no forecast of speed for this card"
        self.query_one("#frontier-summary", Static).update(words)
        self._fill()

    def on_resize(self) -> None:
        """Fit the lines to the new width."""
        self._fill()

    def _fill(self) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        if self._now is not None:
            options.add_options([Option(self._line(self._now, point)) for point in self._points])
        options.display = bool(self._points)

    @on(OptionList.OptionSelected)
    def _apply(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Applied(self._points[event.option_index].setup))

    def _line(self, now: Sizing, point: FrontierPoint) -> Text:
        colours, setup = self.app.theme_variables, point.setup
        width = max(_LEAST_TITLE, min(_MOST_TITLE, self.content_size.width - _FIGURES))
        mark = "▸ " if setup == now.setup else "★ " if point.chosen and point.fits else "  "
        batch = f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(mark, colours["primary"])
        text.append(plain(f"{batch} {point.strategy}", width - 3).ljust(width - 2))
        text.append(f"{point.peak_upper_bytes / GIB:>7,.1f}", colours["success" if point.fits else "error"])
        return text.append(f"{point.tokens_per_second:>8,.0f}", colours["muted"])
