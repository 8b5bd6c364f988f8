"""What the terminal interface keeps: theme, card, display and price, as settings that commands read too."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.tui.app import VramwiseApp
from launcher.tui.cards import card_from_text
from planner.base.errors import UnknownNameError
from planner.base.settings import Settings, load_settings, settings_path
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

from .conftest import settle
from .test_sizing_screen import screen_of, shown_text


def make(tmp_path: Path, **asked: object) -> VramwiseApp:
    return VramwiseApp(
        model=resolve_model("qwen2.5-0.5b"),
        card=card_from_text("12GB", display=True),
        setup=TrainingSetup(model="qwen2.5-0.5b", max_length=512),
        runs_root=tmp_path / "runs",
        **asked,  # type: ignore[arg-type]
    )


async def test_theme_card_display_and_price_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "data"))
    app = make(tmp_path, price=0.25, theme="nord", keeps=True)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        assert app.theme == "nord"
        assert screen_of(pilot).sizing.card.display  # type: ignore[union-attr]
        assert screen_of(pilot).sizing.wishes.usd_per_gpu_hour == 0.25  # type: ignore[union-attr]
        assert load_settings() == Settings()
        app.theme = "gruvbox"
        await settle(pilot)
        assert load_settings() == Settings(theme="gruvbox")
        await pilot.press("k")
        await settle(pilot)
        assert load_settings() == Settings(theme="gruvbox", gpu="12GB", display=True, price_per_hour=0.25)
        assert "kept in" in shown_text(pilot)
        # A file that holds no settings is left as it is, and that is said.
        settings_path().write_text("gpu = [\n")
        app.theme = "nord"
        await settle(pilot)
        assert settings_path().read_text() == "gpu = [\n"
        assert any("config.toml" in told.message for told in app._notifications)
    assert app.model_name == "qwen2.5-0.5b"


def test_a_theme_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="gruvbocks"):
        make(tmp_path, theme="gruvbocks")
