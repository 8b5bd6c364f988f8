"""The demo, trained on the CPU through the interface."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from textual.widgets import Input

from launcher.runs import supervisor
from launcher.tui import cards
from launcher.tui.app import VramwiseApp
from launcher.tui.inspection import inspector
from launcher.tui.screens.run import RunScreen
from planner.base.data_files import PROFILES
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

from .conftest import settle
from .test_sizing_screen import shown_text

pytest.importorskip("torch")
pytest.importorskip("trl")

MODEL = PROFILES / "demo" / "model"
DATA = PROFILES / "demo" / "data" / "train.jsonl"
STEPS = 40
LIMIT_SECONDS = 800


@pytest.mark.slow
async def test_the_demo_is_started_followed_and_seen_to_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "detected_cards", lambda: ())
    app = VramwiseApp(
        model=resolve_model(str(MODEL), inspector=inspector),
        card=cards.card_from_text("16GB"),
        setup=TrainingSetup(model=str(MODEL), max_length=128, per_device_train_batch_size=4, dtype="float32"),
        runs_root=tmp_path / "runs",
        data=str(DATA),
    )
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("t")
        await settle(pilot)
        app.screen.query_one("#start-steps", Input).value = str(STEPS)
        await pilot.press("ctrl+s")
        await settle(pilot)
        screen = app.screen
        assert isinstance(screen, RunScreen), shown_text(pilot)
        deadline = time.monotonic() + LIMIT_SECONDS
        while screen.snapshot is None or not screen.snapshot.over:
            assert time.monotonic() < deadline, shown_text(pilot)
            # The trainer is another process: there is no worker of ours to wait for.
            await asyncio.sleep(0.2)
        await settle(pilot)
        assert screen.snapshot.state == "finished", shown_text(pilot)
        assert screen.snapshot.step == STEPS
        assert len(screen.snapshot.losses) == STEPS
        losses = [loss for _, loss in screen.snapshot.losses]
        assert sum(losses[-10:]) < sum(losses[:10]), losses
        assert screen.snapshot.prediction is not None
        assert screen.snapshot.prediction.plan is not None
        assert "FINISHED" in shown_text(pilot)
        assert (screen.folder.adapter / "adapter_model.safetensors").is_file()
        assert supervisor.status(screen.folder.path).state == "finished"
