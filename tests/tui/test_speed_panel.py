"""Beside a time stands what it costs, whose price that is and of which day, or that none is known."""

from __future__ import annotations

import re

import pytest

from launcher.tui.cards import card_from_text
from launcher.tui.sizing import size_up
from launcher.tui.widgets.sizing.speed_panel import _wrapping, speed
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

SETUP = TrainingSetup(model="qwen2.5-0.5b", max_length=512)


def shown(gpu: str) -> list[str]:
    sizing = size_up(SETUP, resolve_model(SETUP.model), card_from_text(gpu))
    return speed(sizing, muted="grey", warning="red").plain.splitlines()


def test_a_known_price_has_its_source_and_date() -> None:
    lines = shown("rtx-4090")
    cost = re.fullmatch(r"(\d+)m (\d\d)s and \$(\d+\.\d\d) per million tokens", lines[1])
    assert cost is not None, lines
    hours = (int(cost[1]) + int(cost[2]) / 60) / 60
    assert float(cost[3]) == pytest.approx(0.39 * hours, abs=0.006)
    assert lines[2] == "price $0.39 a GPU-hour (Akash, on-demand, 2026-09-20)"


def test_an_unknown_price_is_said_to_be_unknown() -> None:
    lines = shown("16GB")
    assert re.fullmatch(r"\d+m \d\ds per million tokens", lines[1])
    assert lines[2] == "price not known for rtx-5060-ti-16gb"


def test_a_card_with_another_price_is_laid_out_anew() -> None:
    model = resolve_model(SETUP.model)
    first, other = (size_up(SETUP, model, card_from_text(gpu)) for gpu in ("rtx-4090", "rtx-4080"))
    assert _wrapping(first) != _wrapping(other)
