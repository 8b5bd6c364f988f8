"""The answers, over everything else: what is asked, whether it fits, the whole run, the longest sequences,
the difference to what is pinned, and the memory bar.
"""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical

from launcher.tui.longest import LongestAnswer
from launcher.tui.sizing import Sizing
from launcher.tui.text import gib, plain, signed_size
from launcher.tui.themes import Colours, colours, component_colours
from launcher.tui.whole_run import run_lines
from launcher.tui.widgets.sizing.memory_bar import BarData, BarPart, MemoryBar
from launcher.tui.widgets.sizing.verdict_line import VerdictLine
from launcher.tui.widgets.text_line import TextLine
from planner.setup.defaults import SHORTEST_LENGTH
from planner.text.figures import count, dollars, duration, rate

NARROW = 76
"""Columns below which the whole run and the longest sequences share a line."""


class Headline(Vertical):
    """Shows a sizing in lines that are cut at the widget's width."""

    def __init__(self) -> None:
        super().__init__(id="headline")
        self._sizing: Sizing | None = None
        self._longest: LongestAnswer | None = None
        self._pinned: Sizing | None = None

    def compose(self) -> ComposeResult:
        """The lines and the bar."""
        yield TextLine(id="question")
        yield VerdictLine()
        yield TextLine(id="whole-run")
        yield TextLine(id="longest")
        yield TextLine(id="pinned")
        yield MemoryBar()

    def on_resize(self) -> None:
        """Say it in as many lines as there is room for."""
        self._show_lines()

    def show(self, sizing: Sizing, longest: LongestAnswer | None, pin: Sizing | None) -> None:
        """Show another answer, the longest sequences, None while they are looked for, and how the answer
        differs from a pinned one, if one is.
        """
        self._sizing, self._longest, self._pinned = sizing, longest, pin
        self.query_one("#pinned", TextLine).display = pin is not None
        self._show_lines()
        self.query_one(VerdictLine).sizing = sizing
        self.query_one(MemoryBar).data = bar(sizing)

    def on_mount(self) -> None:
        """Draw anew in another theme's colours."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._show_lines())

    def _show_lines(self) -> None:
        sizing = self._sizing
        if sizing is None:
            return
        self.query_one("#question", TextLine).text = question(sizing, colours(self.app).muted)
        if self._pinned is not None:
            self.query_one("#pinned", TextLine).text = pinned(sizing, self._pinned, colours(self.app))
        muted, narrow = colours(self.app).muted, self.app.size.width < NARROW
        run, longest = self.query_one("#whole-run", TextLine), self.query_one("#longest", TextLine)
        has_data = sizing.wishes.data is not None
        run.display = has_data
        longest.display = not (narrow and has_data)
        found = longest_line(self._longest, muted, short=narrow)
        longest.text = found
        run.text = whole_run(sizing, muted, width=self.app.size.width - 4)
        if narrow and has_data:
            run.text = run.text.append(" · ", muted).append_text(found)


def question(sizing: Sizing, muted: str) -> Text:
    """What is asked: model and card."""
    card = sizing.card
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(plain(sizing.setup.model, 60), "bold")
    text.append(f" {count(sizing.model.parameter_count)}", muted)
    text.append(" on ", muted)
    text.append(plain(card.title, 60), "bold")
    if card.argument is not None:
        text.append(f" {plain(card.detail, 60)}", muted)
    return text


def bar(sizing: Sizing) -> BarData:
    """The memory bar of an answer."""
    memory = sizing.memory
    colours = component_colours(component.name for component in memory.components)
    return BarData(
        parts=tuple(BarPart(c.size_bytes, colours[c.name]) for c in memory.components if c.size_bytes),
        peak_bytes=memory.peak_bytes,
        upper_bytes=memory.peak_upper_bytes,
        usable_bytes=sizing.card.usable_bytes,
        held=sizing.card.held,
    )


def whole_run(sizing: Sizing, muted: str, *, width: int) -> Text:
    """Time, price and steps of the run over the data, in a line; empty without data. What there is no room
    for is left out, the price is not.
    """
    data, text = sizing.wishes.data, Text(no_wrap=True, overflow="ellipsis")
    if data is None:
        return text
    if width >= NARROW - 4:
        text.append(f"{plain(data.name, 40)} ", "bold")
    if sizing.run is None:
        return text.append(plain(sizing.no_run) or "...", muted)
    found = sizing.run.duration
    if found is None or found.steps is None:
        return text.append(dict(run_lines(sizing, sizing.run))["time"], "bold")
    text.append(duration(found.hours), "bold")
    price = "no price known" if found.usd is None else dollars(found.usd)
    text.append(f", {price}", "bold" if found.usd is not None else muted)
    cut = sizing.run.data.truncated_examples
    for more in (
        f" ({duration(found.hours_low)} to {duration(found.hours_high)})",
        f"  {found.steps:,} steps",
        f", {cut:,} of {data.count:,} cut" if cut else "",
    ):
        if width < NARROW - 4 or text.cell_len + len(more) > width:
            break
        text.append(more, muted)
    return text


def longest_line(found: LongestAnswer | None, muted: str, *, short: bool) -> Text:
    """The longest sequences in a line, as `plan --longest` tells them."""
    text = Text(no_wrap=True, overflow="ellipsis").append("longest ", "" if short else "bold")
    if found is None:
        return text.append("...", muted)
    if found.longest is None:
        return text.append(plain(found.refusal) or f"not even {SHORTEST_LENGTH:,} tokens fit", muted)
    one = found.longest
    text.append(f"{one.max_length:,}", "bold")
    if short:
        return text
    speed = "" if one.tokens_per_second is None else f" at {rate(one.tokens_per_second)} tokens/s"
    ends = "the model's own window" if one.reaches_model_limit else "more do not fit"
    return text.append(" tokens", "bold").append(f"{speed}, {ends}; l takes it", muted)


def pinned(now: Sizing, pin: Sizing, shown: Colours) -> Text:
    """What is pinned, and by how much each figure of the headline differs from it."""
    text = Text(no_wrap=True, overflow="ellipsis").append("pinned ", f"bold {shown.accent}")
    peak = now.memory.peak_upper_bytes - pin.memory.peak_upper_bytes
    found = [f"at most {gib(pin.memory.peak_upper_bytes)} ({signed_size(peak)})"]
    if now.step is not None and pin.step is not None:
        rates = now.step.tokens_per_second, pin.step.tokens_per_second
        found.append(f"{rate(rates[1])} tokens/s ({rates[0] / rates[1] - 1:+.0%})")
    found += _durations(now, pin)
    text.append(" · ".join(found))
    what = f"{pin.setup.model}, {pin.card.title}, {pin.setup.max_length:,} tokens"
    return text.append(f"  {plain(what, 120)}", shown.muted)


def _durations(now: Sizing, pin: Sizing) -> list[str]:
    """Time and price of the pinned run, each with the difference of the present one."""
    durations = [None if one.run is None else one.run.duration for one in (now, pin)]
    if durations[0] is None or durations[1] is None:
        return []
    mine, yours = durations[0], durations[1]
    found = [f"{duration(yours.hours)} ({mine.hours / yours.hours - 1:+.0%})"]
    if mine.usd is not None and yours.usd:
        found.append(f"{dollars(yours.usd)} ({mine.usd / yours.usd - 1:+.0%})")
    return found
