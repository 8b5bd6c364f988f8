"""The pickers of the sizing screen: models and GPUs, each with the verdict on the present knobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.tui import cards, knobs
from launcher.tui.screens import sizing_parts as parts
from launcher.tui.screens.picker import Picker, Remark, Row
from launcher.tui.sizing import Wishes, size_up
from launcher.tui.text import plain
from planner.base.errors import InputError
from planner.models.catalog import list_models, resolve_model
from planner.models.spec import ModelSpec

_NOT_POSSIBLE = Remark("not possible", "muted")


def model_picker(
    model: ModelSpec,
    card: cards.Card,
    texts: Mapping[str, str],
    others: Mapping[str, Any],
    wishes: Wishes,
) -> Picker:
    """Models, each with what it needs at the present knobs; dismissed with a name."""

    def remark(row: Row) -> Remark:
        try:
            setup = knobs.to_setup(row.key, texts, others)
            sized = size_up(setup, resolve_model(row.key), card, wishes=wishes)
        except InputError:
            return _NOT_POSSIBLE
        return parts.remark(sized)

    return Picker(
        f"Model · needs on {plain(card.title, 30)}",
        parts.model_rows(list_models()),
        current=model.id,
        prompt="name, Hub id, or folder with config.json",
        remark=remark,
    )


def gpu_picker(
    known: Mapping[str, cards.Card],
    card: cards.Card,
    model: ModelSpec,
    name: str,
    texts: Mapping[str, str],
    others: Mapping[str, Any],
    wishes: Wishes,
) -> Picker:
    """The known cards, each with the verdict on the present setup; dismissed with a key or a text."""

    def remark(row: Row) -> Remark:
        try:
            there = cards.attached(known[row.key], display=card.display)
            setup = knobs.to_setup(name, knobs.on_card(texts, card.spec, there.spec), others)
            return parts.remark(size_up(setup, model, there, wishes=wishes))
        except InputError:
            return _NOT_POSSIBLE

    return Picker(
        f"GPU · for {plain(name, 30)} at the present knobs",
        parts.card_rows(known),
        current=next((key for key, one in known.items() if one.title == card.title), ""),
        prompt="name or size: 4090, 24GB",
        remark=remark,
    )
