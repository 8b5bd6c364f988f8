"""What the sizing screen opens on: what `plan` would choose for the model and the card."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from textual.widgets import Input

from launcher.tui import advice
from launcher.tui.app import VramwiseApp
from launcher.tui.cards import Card, card_from_text
from launcher.tui.screens.reading import Opening
from launcher.tui.sizing import Wishes
from planner.base.errors import InputError
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup

from .conftest import MakeApp, settle
from .test_sizing_screen import screen_of, shown_text

SEARCHING = "searching the fastest setup..."


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds the search until it is set."""
    held, search = threading.Event(), advice.opening_choice

    def waits(name: str, model: ModelSpec, card: Card, wishes: Wishes) -> TrainingSetup:
        held.wait(300)
        return search(name, model, card, wishes)

    monkeypatch.setattr(advice, "opening_choice", waits)
    yield held
    held.set()


@pytest.mark.parametrize(
    ("model", "gpu"),
    [
        ("qwen2.5-14b", "16GB"),
        # Nothing fits: the smallest.
        ("llama-3.1-70b", "16GB"),
        ("qwen2.5-0.5b", "t4"),
    ],
)
async def test_it_opens_on_the_setup_of_plan_with_its_figures(
    make_app: MakeApp, model: str, gpu: str
) -> None:
    plan = make_plan(make_request(model, gpu=gpu), whole=False)
    async with make_app(model=model, gpu=gpu, automatic=True).run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        assert sizing.setup == plan.setup
        assert sizing.memory == plan.memory
        assert sizing.step == plan.speed
        texts = screen_of(pilot).form.texts
        assert texts["compile"] == plan.setup.compile
        assert screen_of(pilot).query_one("#knob-max_length", Input).value == str(plan.setup.max_length)
        assert "searching" not in shown_text(pilot)


async def test_it_draws_at_once_and_says_that_it_searches(make_app: MakeApp, let_go: threading.Event) -> None:
    async with make_app(automatic=True).run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        assert SEARCHING in shown_text(pilot)
        assert "FITS" in shown_text(pilot)
        first = screen_of(pilot).sizing
        let_go.set()
        await settle(pilot)
        assert "searching" not in shown_text(pilot)
        assert screen_of(pilot).sizing.setup != first.setup  # type: ignore[union-attr]


async def test_keys_are_taken_while_it_searches_and_win(make_app: MakeApp, let_go: threading.Event) -> None:
    async with make_app(automatic=True).run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "searching..." in shown_text(pilot)
        await pilot.press("right")
        await pilot.pause()
        mine = screen_of(pilot).sizing
        assert mine is not None
        assert mine.setup.max_length == 6144
        assert "searching" not in shown_text(pilot)
        let_go.set()
        await settle(pilot)
        assert screen_of(pilot).sizing.setup == mine.setup  # type: ignore[union-attr]
        assert screen_of(pilot).sizing.refined  # type: ignore[union-attr]


async def test_a_card_that_is_picked_while_it_searches_is_kept(
    make_app: MakeApp, let_go: threading.Event
) -> None:
    async with make_app(automatic=True).run_test(size=(120, 40)) as pilot:
        await pilot.press("g", *"rtx-4090", "enter")
        await pilot.pause()
        let_go.set()
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        assert sizing.card.argument == "rtx-4090"
        assert sizing.setup.compile == "none"


async def test_where_no_search_is_possible_the_first_answer_is_refined(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> TrainingSetup:
        raise InputError("no")

    monkeypatch.setattr(advice, "opening_choice", refuses)
    async with make_app(automatic=True).run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert screen_of(pilot).sizing.refined  # type: ignore[union-attr]
        assert "searching" not in shown_text(pilot)


async def test_what_was_applied_is_taken_back_step_by_step(make_app: MakeApp) -> None:
    async with make_app(gpu="80GB").run_test(size=(120, 40), notifications=True) as pilot:
        await settle(pilot)
        first = screen_of(pilot).sizing
        await pilot.press("a")
        await settle(pilot)
        assert screen_of(pilot).sizing.setup != first.setup  # type: ignore[union-attr]
        assert "takes it back" in shown_text(pilot)
        await pilot.press("u")
        await settle(pilot)
        assert screen_of(pilot).sizing == first
        assert screen_of(pilot).form.texts["gradient_checkpointing"] == "on"
        await pilot.press("u")
        await settle(pilot)
        assert "nothing was applied" in shown_text(pilot)


@pytest.mark.parametrize("refused", [False, True])
async def test_a_model_that_takes_long_to_read_is_named_meanwhile(tmp_path: Path, refused: bool) -> None:
    let_go = threading.Event()

    def read() -> tuple[ModelSpec, TrainingSetup]:
        let_go.wait(300)
        if refused:
            raise InputError("/models/mine: no config.json")
        return resolve_model("qwen2.5-0.5b"), TrainingSetup(model="qwen2.5-0.5b", max_length=512)

    opening = Opening(name="/models/[b]mine[/b]", read=read)
    app = VramwiseApp(opening=opening, card=card_from_text("12GB"), runs_root=tmp_path / "runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "reading the model /models/[b]mine[/b], 0 s" in shown_text(pilot)
        let_go.set()
        await settle(pilot)
        if not refused:
            assert "FITS" in shown_text(pilot)
            assert app.model_name == "qwen2.5-0.5b"
    assert app.refusal == ("/models/mine: no config.json" if refused else "")
    assert app.return_code == (2 if refused else None)
