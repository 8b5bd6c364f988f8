"""What the sizing screen says of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text

from launcher.tui import cards, knobs
from launcher.tui.screens.picker import Remark, Row
from launcher.tui.sizing import Sizing, Verdict
from launcher.tui.text import FITS, TIGHT, TOO_BIG, gib, plain
from launcher.tui.themes import component_colours
from launcher.tui.widgets.memory_bar import BarData, BarPart
from planner.models.catalog import ModelSummary
from planner.text.figures import count

_VERDICT_COLOURS = {Verdict.FITS: "success", Verdict.TIGHT: "warning", Verdict.DOES_NOT_FIT: "error"}


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
    )


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
    first = message.split(" ", 1)[0].rstrip(":")
    return first if first in knobs.FORM_FIELDS else None
