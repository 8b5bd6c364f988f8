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
from launcher.tui.text import FITS, TIGHT, TOO_BIG, gib
from planner.models.catalog import ModelSummary
from planner.text.figures import count

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
