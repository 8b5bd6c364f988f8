"""A model that takes long to describe: the first frame comes before the rest of the interface is imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from textual.worker import WorkerCancelled

from launcher.tui.beginning.reading_app import ReadingApp
from launcher.tui.screens.reading import Opening
from planner.base.errors import InputError
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

from .test_sizing_screen import shown_text

ROOT = Path(__file__).resolve().parents[2]
LATE = """
import sys
import launcher.commands.tui, launcher.tui.beginning.reading_app, launcher.tui.cards
late = ("launcher.tui.app", "launcher.tui.sizing", "planner.planning.make_plan", "planner.search.find")
print([name for name in late if name in sys.modules])
"""


def test_what_is_drawn_first_needs_neither_search_nor_sizing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("ends", ["read", "refused", "left"])
async def test_it_says_what_it_reads_and_hands_on_what_it_read(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, model = threading.Event(), resolve_model("qwen2.5-0.5b")
    found = model, TrainingSetup(model="qwen2.5-0.5b", max_length=1024)

    def read() -> tuple:
        go.wait(30)
        if ends == "refused":
            raise InputError("that is no model")
        return found

    # Neither another test's signals nor half a second of imports.
    monkeypatch.setattr(ReadingApp, "_import_rest", lambda self: None)
    app = ReadingApp(Opening(name="/models/[b]mine[/b]", read=read), theme="no theme")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "reading the model /models/[b]mine" in shown_text(pilot)
        if ends == "left":
            await pilot.press("ctrl+q")
            go.set()
        else:
            go.set()
            # Its end ends the worker that has read, at whatever moment that is at.
            with suppress(WorkerCancelled):
                await pilot.app.workers.wait_for_complete()
            await pilot.pause()
    assert app.return_value == {"read": found, "refused": "that is no model", "left": None}[ends]
