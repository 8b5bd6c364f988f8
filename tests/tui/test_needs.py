"""What do I need: each row is what a plan for that card answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from textual.widgets import DataTable, Input

from launcher.tui.screens import needs
from launcher.tui.screens.needs import NeedsScreen, asked_about, ordered
from planner.planning.asked import Asked
from planner.planning.cards_for import CardAnswer
from planner.planning.make_plan import make_plan

from .conftest import MakeApp, settle
from .test_sizing_screen import screen_of, shown_text


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cards instead of nineteen: one too small, one slow, one fast."""
    few = {"desktop": ("rtx-2060-6gb", "rtx-3060-12gb"), "rented": ("h100-nvl-94gb",)}
    monkeypatch.setattr("planner.planning.cards_for.CARDS", few)


@pytest.mark.usefixtures("three")
async def test_cards_are_told_with_time_and_price_and_one_is_taken(make_app: MakeApp) -> None:
    async with make_app(model="qwen2.5-7b", max_length=2048).run_test(size=(120, 30)) as pilot:
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        await pilot.press("n")
        await settle(pilot)
        screen = pilot.app.screen
        assert isinstance(screen, NeedsScreen)
        table = screen.query_one(DataTable)
        small, slow, fast = "rtx-2060-6gb", "rtx-3060-12gb", "h100-nvl-94gb"
        assert [str(cell) for cell in table.get_column_at(0)] == [slow, fast, small]
        request = dataclasses.replace(asked_about(sizing).request, gpu="rtx-3060-12gb")
        plan = make_plan(request, whole=False)
        answer = next(one for one in screen._answers if one.gpu == "rtx-3060-12gb")
        assert plan.duration is not None
        assert (answer.setup, answer.fits) == (plan.setup, plan.fits)
        assert (answer.hours, answer.usd) == (plan.duration.hours, plan.duration.usd)
        assert answer.peak_upper_bytes == plan.memory.peak_upper_bytes
        # Within hours that it does not keep, it comes after those that do.
        screen.query_one("#needs-limit", Input).value = f"{answer.hours / 2:.4f}"  # type: ignore[operator]
        await settle(pilot)
        assert "! too slow" in shown_text(pilot)
        assert "✘ too big" in shown_text(pilot)
        assert [str(cell) for cell in table.get_column_at(0)] == [fast, slow, small]
        table.focus()
        await pilot.press("down", "enter")
        await settle(pilot)
        now = screen_of(pilot).sizing
        assert now is not None
        assert now.card.argument == "rtx-3060-12gb"
        assert now.setup == plan.setup


def answer(gpu: str, *, fits: bool = True, hours: float | None = 1.0, usd: float | None = 1.0) -> CardAnswer:
    values = {"gpu": gpu, "name": gpu, "kind": "desktop", "usable_bytes": 1, "peak_upper_bytes": 1}
    return CardAnswer(**values, fits=fits, setup=None, hours=hours, usd=usd)  # type: ignore[arg-type]


def test_what_does_it_in_time_comes_first_and_what_does_not_fit_last() -> None:
    cheap, fast = answer("cheap", hours=9.0), answer("fast", usd=7.0)
    unpriced, small = answer("unpriced", usd=None), answer("small", fits=False, hours=None, usd=None)
    given = [small, unpriced, fast, cheap]
    assert ordered(given, None, by_cost=True) == [cheap, fast, unpriced, small]
    assert ordered(given, 2.0, by_cost=True) == [fast, unpriced, cheap, small]
    assert ordered(given, None, by_cost=False) == [fast, unpriced, cheap, small]


async def test_why_no_card_can_be_asked_about_is_said(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(asked: Asked) -> Iterator[CardAnswer]:
        raise needs.InputError("the batch cannot be had")

    monkeypatch.setattr(needs, "cards_for", refuses)
    async with make_app(model="qwen2.5-0.5b").run_test(size=(120, 24)) as pilot:
        await settle(pilot)
        await pilot.press("n")
        await settle(pilot)
        assert "the batch cannot be had" in shown_text(pilot)
        await pilot.press("escape")
        await settle(pilot)
        assert screen_of(pilot).sizing is not None
