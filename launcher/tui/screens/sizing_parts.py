"""What the sizing screen says of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text
from textual.screen import Screen
from textual.widgets import Static

from launcher.tui import cards, knobs
from launcher.tui.screens.picker import Remark, Row
from launcher.tui.sizing import Sizing, Verdict
from launcher.tui.text import FITS, TIGHT, TOO_BIG, gib, plain, signed_size
from launcher.tui.themes import Colours, component_colours
from launcher.tui.whole_run import run_lines
from launcher.tui.widgets.sizing.memory_bar import BarData, BarPart
from planner.models.catalog import ModelSummary
from planner.text.figures import count, dollars, duration, rate

PANELS = (
    ("knobs", "#form-scroll", "#knob-max_length"),
    ("memory", "Legend", ""),
    ("data", "DataPanel", ""),
    ("speed", "SpeedPanel", ""),
    ("phases", "PhaseTable", ""),
    ("what to change", "AdvicePanel", "AdvicePanel *"),
    ("speed against memory", "FrontierPanel", "FrontierPanel *"),
)
"""Title of each panel, the widget it is, and what of it takes the focus; its number is the key to it."""
_VERDICT_COLOURS = {Verdict.FITS: "success", Verdict.TIGHT: "warning", Verdict.DOES_NOT_FIT: "error"}


def heading(title: str) -> Static:
    """A panel's heading, with the number that leads there."""
    number = next(at for at, panel in enumerate(PANELS, 1) if panel[0] == title)
    return Static(Text(f"{number} {title}"), classes="heading")


def go_to(screen: Screen[Any], number: int) -> None:
    """Bring the panel of a number to the top, and give the focus to what of it takes one."""
    _, place, focus = PANELS[number - 1]
    takes = [one for one in screen.query(focus) if one.focusable] if focus else []
    screen.set_focus(takes[0] if takes else None, scroll_visible=False)
    screen.query_one(place).scroll_visible(animate=False, top=True)


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


def whole_run(sizing: Sizing, muted: str) -> Text:
    """Steps, time and price of the run over the data, in a line; empty without data."""
    data, text = sizing.wishes.data, Text(no_wrap=True, overflow="ellipsis")
    if data is None:
        return text
    text.append(f"{plain(data.name, 40)} ", "bold")
    if sizing.run is None:
        return text.append(plain(sizing.no_run) or "...", muted)
    lines = dict(run_lines(sizing, sizing.run))
    found = sizing.run.duration
    text.append(lines["time"], "bold")
    if found is not None and found.usd is not None:
        text.append(f", {dollars(found.usd)}", "bold")
    cut = sizing.run.data.truncated_examples
    steps = f"{found.steps:,} steps" if found is not None and found.steps is not None else ""
    more = ", ".join(part for part in (steps, f"{cut:,} of {data.count:,} cut" if cut else "") if part)
    return text.append(f"  {more}" if more else "", muted)


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


def model_rows(models: Iterable[ModelSummary]) -> tuple[Row, ...]:
    """Models as a picker shows them."""
    return tuple(
        Row(
            key=model.id,
            name=model.id,
            detail=count(model.parameter_count).rjust(7),
            search=" ".join((model.hub_id, *model.aliases, model.architecture)),
        )
        for model in models
    )


def card_rows(known: Mapping[str, cards.Card]) -> tuple[Row, ...]:
    """Cards as a picker shows them, each with where it comes from or what a size stands for."""
    return tuple(
        Row(
            key=key,
            name=card.title,
            detail=f"of {gib(card.usable_bytes):>9}  "
            + (card.spec.name if card.group == cards.SIZE else card.group),
            search=" ".join((card.spec.name, *card.spec.aliases)),
        )
        for key, card in known.items()
    )


def remark(sizing: Sizing) -> Remark:
    """Verdict and peak, as a remark in a picker."""
    verdict = sizing.verdict
    told = {Verdict.FITS: FITS, Verdict.TIGHT: TIGHT, Verdict.DOES_NOT_FIT: TOO_BIG}[verdict]
    figure = gib(sizing.memory.peak_bytes)
    return Remark(f"{told:<{len(TOO_BIG)}} {figure:>9}", _VERDICT_COLOURS[verdict])


def other_fields(others: Mapping[str, Any]) -> str:
    """Fields that are set and have no knob."""
    return "also " + ", ".join(f"{name}={value}" for name, value in others.items()) if others else ""


def field_of(message: str) -> str | None:
    """The knob that a message about two knobs begins with."""
    first = message.split(" ", 1)[0].partition("=")[0].rstrip(":")
    return first if first in knobs.FORM_FIELDS else None
