"""What becomes of a wish for a run that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.widgets import Input

from launcher.tui import starting
from launcher.tui.screens.start_run import RunWish, StartRun
from launcher.tui.sizing import Sizing
from planner.base.errors import InputError

from .conftest import MakeApp, settle
from .test_sizing_screen import shown_text


async def test_the_form_comes_back_as_it_was_filled_with_the_reason(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[RunWish] = []

    def refuses(answer: Sizing, wish: RunWish, *, allow_download: bool) -> None:
        assert not allow_download
        tried.append(wish)
        raise InputError("row 3 is no example")

    monkeypatch.setattr(starting, "refuse_what_cannot_start", lambda answer: None)
    monkeypatch.setattr(starting, "start", refuses)
    (tmp_path / "data.jsonl").write_text("{}\n")
    filled = {"data": str(tmp_path / "data.jsonl"), "model": "/models/mine", "epochs": "2.5", "steps": ""}
    async with make_app(model="qwen2.5-0.5b").run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        await pilot.press("t")
        await settle(pilot)
        for name, value in filled.items():
            pilot.app.screen.query_one(f"#start-{name}", Input).value = value
        await pilot.press("ctrl+s")
        await settle(pilot)
        assert isinstance(pilot.app.screen, StartRun)
        assert "row 3 is no example" in shown_text(pilot)
        shown = {name: pilot.app.screen.query_one(f"#start-{name}", Input).value for name in filled}
        assert shown == filled
        await pilot.press("ctrl+s")
        await settle(pilot)
        assert len(tried) == 2
        assert tried[0] == tried[1]
