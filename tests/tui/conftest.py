"""Fixtures for the terminal interface."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.worker import WorkerCancelled

from launcher.runs.folder import RunFolder
from launcher.tui import cards
from launcher.tui.app import VramwiseApp
from planner.models.catalog import resolve_model
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

MakeApp = Callable[..., VramwiseApp]
Scene = Callable[[Pilot[None], Path], Awaitable[None]]
"""What is seen in an app that others have been seen in, with a folder of its own."""


def joins(scenes: list[Scene]) -> Callable[[Scene], Scene]:
    """Add a scene to those that a test plays."""

    def added(scene: Scene) -> Scene:
        scenes.append(scene)
        return scene

    return added


@pytest.fixture
def make_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeApp:
    """Builds the application on a 16 GB card, on a machine without a GPU, its run folders in tmp_path."""
    monkeypatch.setattr(cards, "detected_cards", lambda: ())

    def build(
        model: str = "qwen2.5-14b",
        gpu: str = "16GB",
        run: RunFolder | None = None,
        automatic: bool = False,
        **knobs: Any,
    ) -> VramwiseApp:
        values = {"max_length": 4096, "gradient_accumulation_steps": 16, "optim": defaults.OPTIM, **knobs}
        return VramwiseApp(
            model=resolve_model(model),
            card=cards.card_from_text(gpu),
            setup=TrainingSetup(model=model, **values),
            automatic=automatic,
            runs_root=tmp_path / "runs",
            run=run,
        )

    return build


async def settle(pilot: Pilot[None]) -> None:
    """Wait until workers are done and what they posted is shown."""
    for _ in range(3):
        # What a later change overtakes is cancelled: what counts is what comes after it.
        with contextlib.suppress(WorkerCancelled):
            await pilot.app.workers.wait_for_complete()
        await pilot.pause()


async def play(
    scenes: Iterable[Scene],
    pilot: Pilot[None],
    folder: Path,
    *,
    begin: Callable[[Pilot[None]], Awaitable[None]] = settle,
) -> None:
    """Look at all scenes in one app, which takes a second to open, each after `begin`; tell of all that are
    wrong, by name.
    """
    seen, wrong = 0, []
    for scene in scenes:
        seen += 1
        own = folder / scene.__name__
        own.mkdir()
        try:
            await begin(pilot)
            await scene(pilot, own)
        except AssertionError as error:
            wrong.append(f"{scene.__name__}: {error}")
        except BaseException as error:
            error.add_note(f"in {scene.__name__}")
            raise
    assert seen, "there is nothing to look at"
    assert not wrong, "\n".join(wrong)
