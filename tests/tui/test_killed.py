"""The interface is killed while a run goes on: the run does not notice, and one key leads back to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher.runs.events import LogEvent, read_events
from launcher.runs.locks import is_alive
from launcher.tui.screens.run import RunScreen

from . import synthetic
from .conftest import MakeApp, settle
from .test_run_screen import see

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from launcher.runs.folder import RunFolder
from launcher.runs.minding.spawn import spawn
from launcher.tui import cards
from launcher.tui.app import VramwiseApp
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

async def main():
    folder = RunFolder(Path(sys.argv[1]))
    app = VramwiseApp(model=resolve_model("qwen2.5-0.5b"), card=cards.card_from_text("16GB"),
        setup=TrainingSetup(model="qwen2.5-0.5b", max_length=1024), runs_root=folder.path.parent)
    async with app.run_test() as pilot:
        # The way in which the supervisor starts a run's processes.
        spawn(folder, "trainer", "tests.tui.stand_in_trainer")
        app.follow(folder)
        while not (app.screen.snapshot and app.screen.snapshot.step >= 3):
            await pilot.pause(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_killed_interface_is_one_key_away_from_its_run_and_nothing_is_lost(
    make_app: MakeApp, tmp_path: Path
) -> None:
    folder = synthetic.make_folder(tmp_path / "runs" / "a-run")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder.path)], cwd=ROOT, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert is_alive(folder)
    then = read_events(folder.events)[-1]
    app = make_app(model="qwen2.5-0.5b")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "a-run goes on: f follows it" in [one.message for one in app._notifications]
        await pilot.press("f")
        await see(pilot)
        assert isinstance(app.screen, RunScreen)
        assert app.screen.snapshot is not None
        assert app.screen.snapshot.state == "running"
        assert isinstance(then, LogEvent)
        assert app.screen.snapshot.step > then.step
        await pilot.press("escape")
        folder.stop.touch()
        while is_alive(folder):
            time.sleep(0.02)
        # The events are all there: no step is missing, none is there twice.
        steps = [event.step for event in read_events(folder.events) if isinstance(event, LogEvent)]
        assert steps == list(range(1, len(steps) + 1))
        await pilot.press("f")
        await settle(pilot)
        # Nothing goes on any more: all runs are shown instead.
        assert type(app.screen).__name__ == "RunsScreen"
