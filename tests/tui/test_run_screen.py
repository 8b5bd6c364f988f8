from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from textual.pilot import Pilot

from launcher.runs import record as run_record
from launcher.runs.events import StageEvent, WarningEvent
from launcher.runs.folder import RunFolder
from launcher.tui import run_follower
from launcher.tui.app import VramwiseApp
from launcher.tui.screens.confirm import Confirm
from launcher.tui.screens.run import RunScreen, planned
from launcher.tui.screens.runs import RunsScreen
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.widgets.run.phase_comparison import compare
from planner.base.data_files import PROFILES
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request

from . import synthetic
from .conftest import MakeApp, Scene, joins, play, settle
from .test_sizing_screen import shown_text

SIZE = (120, 40)
FOLLOWED: list[Scene] = []
"""Of runs whose trainer is alive."""


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)


async def see(pilot: Pilot[None]) -> RunScreen:
    """Take a snapshot of the files as they are now and show it."""
    await settle(pilot)
    screen = pilot.app.screen
    assert isinstance(screen, RunScreen)
    screen.poll()
    await settle(pilot)
    return screen


async def look_at(pilot: Pilot[None], folder: RunFolder) -> RunScreen:
    """Follow a run, in the place of one that is followed."""
    assert isinstance(pilot.app, VramwiseApp)
    pilot.app.follow(folder)
    await pilot.pause()
    return await see(pilot)


@joins(FOLLOWED)
async def a_growing_run_is_followed(pilot: Pilot[None], tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    await look_at(pilot, folder)
    assert "STARTING" in shown_text(pilot)
    synthetic.append(folder.events, synthetic.start(10), *(synthetic.log(step) for step in (1, 2, 3)))
    await see(pilot)
    text = shown_text(pilot)
    assert "RUNNING" in text
    assert "step 3 of 10" in text
    assert "left" in text
    synthetic.append(folder.events, synthetic.memory("step", 3, 14.02))
    folder.log("trainer").write_text("hello from the trainer\n")
    await see(pilot)
    assert "14.02 GiB" in shown_text(pilot)
    assert "hello from the trainer" in shown_text(pilot)
    synthetic.append(folder.events, synthetic.log(10), synthetic.end("finished", 10))
    await see(pilot)
    text = shown_text(pilot)
    assert "FINISHED" in text
    assert "left" not in text.splitlines()[3]


@joins(FOLLOWED)
async def what_is_done_before_the_first_step_is_shown_with_its_seconds(
    pilot: Pilot[None], tmp_path: Path
) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    await look_at(pilot, folder)
    assert "starting Python and the training stack, " in shown_text(pilot)
    told = StageEvent(time=time.time() - 131, stage="loading", message="loading the [b]weights[/b]")
    synthetic.append(folder.events, told)
    await see(pilot)
    assert re.search(r"loading the \[b\]weights\[/b\], \d+ min \d\d s", shown_text(pilot))
    synthetic.append(folder.events, synthetic.start(10), StageEvent(time=time.time(), stage="training"))
    synthetic.append(folder.events, synthetic.log(1))
    await see(pilot)
    assert re.search(r"✔ loading the \[b\]weights\[/b\] 2 min \d\d s   ▸ training \d s", shown_text(pilot))


async def test_a_dead_run_is_shown(make_app: MakeApp, tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    synthetic.append(folder.events, synthetic.end("oom", 241, "out of memory in the backward pass"))
    async with make_app(run=folder).run_test(size=SIZE) as pilot:
        await see(pilot)
        text = shown_text(pilot)
        assert "OOM" in text
        assert "out of memory in the backward pass" in text
        assert "3 of 1,204 examples are longer" in text


@joins(FOLLOWED)
async def predicted_stands_beside_measured(pilot: Pilot[None], tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    screen = await look_at(pilot, folder)
    assert screen.snapshot is not None
    step = next(row for row in compare(screen.snapshot) if row.phase == "step")
    assert step.measured_bytes == int(14.02 * synthetic.GIB)
    assert step.predicted_bytes is not None
    assert step.error == pytest.approx(step.predicted_bytes / step.measured_bytes - 1)


@joins(FOLLOWED)
async def on_the_cpu_host_memory_is_not_compared_with_a_gpus(pilot: Pilot[None], tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    synthetic.append(folder.events, synthetic.start(5), synthetic.memory("step", 1, None), synthetic.log(1))
    await look_at(pilot, folder)
    text = shown_text(pilot)
    assert "on the CPU" in text
    assert "planned" not in text


@joins(FOLLOWED)
async def stop_asks_and_then_writes_the_file(pilot: Pilot[None], tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    await look_at(pilot, folder)
    await pilot.press("s")
    assert isinstance(pilot.app.screen, Confirm)
    await pilot.press("n")
    await settle(pilot)
    assert not folder.stop.exists()
    await pilot.press("s", "y")
    await see(pilot)
    assert folder.stop.exists()
    assert "STOPPING" in shown_text(pilot)


@pytest.mark.usefixtures("alive")
async def test_leaving_asks_nothing_of_the_run(make_app: MakeApp, tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    app = make_app(run=folder)
    async with app.run_test(size=SIZE) as pilot:
        await see(pilot)
        await pilot.press("d")
        await pilot.pause()
    assert app.return_code == 0
    assert not folder.stop.exists()


async def test_another_run_is_opened_from_the_list(make_app: MakeApp, tmp_path: Path) -> None:
    synthetic.half_way(tmp_path / "runs" / "first-run")
    other = synthetic.make_folder(tmp_path / "runs" / "other-run")
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        await pilot.press("o")
        await settle(pilot)
        await pilot.press("slash", *"other", "enter")
        screen = await see(pilot)
        assert screen.folder.shown == other.path.resolve()
        await pilot.press("escape", "escape", "escape")
        await pilot.pause()
        assert isinstance(pilot.app.screen, SizingScreen)


async def test_a_path_that_is_no_run_is_refused(make_app: MakeApp, tmp_path: Path) -> None:
    async with make_app().run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("o", "slash", *str(tmp_path / "nowhere"), "enter")
        await settle(pilot)
        assert isinstance(pilot.app.screen, RunsScreen)
        assert "No run folder" in shown_text(pilot)


@joins(FOLLOWED)
async def markup_and_control_characters_are_shown_not_obeyed(pilot: Pilot[None], tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run", data="/data/[bold]x.jsonl")
    evil = "[red]warn[/red] \x1b]0;title\x07 \x1b[2J"
    synthetic.append(folder.events, synthetic.start(), WarningEvent(time=1.0, message=evil))
    folder.log("trainer").write_bytes(b"[blink]log[/blink] \x1b[31mred\x1b[0m \x9b31m\n")
    await look_at(pilot, folder)
    text = shown_text(pilot)
    assert "[bold]x.jsonl" in text
    assert "[red]warn[/red]" in text
    assert "[blink]log[/blink]" in text
    assert not any(ord(character) < 32 and character != "\n" for character in text)
    assert "\x9b" not in text


@joins(FOLLOWED)
async def state_progress_and_loss_are_in_sight_at_every_size(pilot: Pilot[None], tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    for size in ((60, 20), (80, 24), (160, 50), SIZE):
        await pilot.resize_terminal(*size)
        await look_at(pilot, folder)
        text = shown_text(pilot)
        assert "RUNNING" in text, size
        assert "step 240 of 400" in text, size
        assert any(0x2800 < ord(character) < 0x2900 for character in text), size


@pytest.mark.usefixtures("alive")
async def test_what_is_shown_of_a_run_that_is_followed(make_app: MakeApp, tmp_path: Path) -> None:
    async with make_app().run_test(size=SIZE) as pilot:
        await play(FOLLOWED, pilot, tmp_path)


@pytest.mark.usefixtures("alive")
async def test_a_run_seen_to_end_is_recorded_once(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[tuple[Path, str]] = []
    monkeypatch.setattr(
        run_record, "store_record", lambda folder, outcome: stored.append((folder.path, outcome))
    )
    folder = synthetic.half_way(tmp_path / "run")
    async with make_app(run=folder).run_test(size=SIZE) as pilot:
        await see(pilot)
        assert not stored
        synthetic.append(folder.events, synthetic.end("stopped", 241))
        await see(pilot)
        await see(pilot)
    assert stored == [(folder.path, "ok")]


async def test_a_run_that_was_over_is_not_recorded_again(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_record, "store_record", lambda folder, outcome: pytest.fail("stored"))
    folder = synthetic.half_way(tmp_path / "run")
    synthetic.append(folder.events, synthetic.end("finished", 400))
    async with make_app(run=folder).run_test(size=SIZE) as pilot:
        await see(pilot)


@pytest.mark.usefixtures("alive")
async def test_what_of_the_data_is_not_trained_is_told_of_a_planned_run(
    make_app: MakeApp, tmp_path: Path
) -> None:
    rows = [{"prompt": "a" * 40, "completion": "b", "id": 1}] * 19 + [
        {"prompt": "a" * 8000, "completion": "b"}
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = synthetic.half_way(tmp_path / "run")
    request = make_request("qwen2.5-0.5b", gpu="16GB", data=str(data), knobs={"max_length": 512})
    folder.plan.write_text(json.dumps(make_plan(request, whole=False).to_dict()))
    async with make_app(run=folder).run_test(size=(60, 20)) as pilot:
        await see(pilot)
        told = " ".join(shown_text(pilot).split())
        assert "data: 1 of 20 examples are cut; 1 of 20 examples are not trained" in told
        assert "left out: id" in told
        assert "price: not known for rtx-5060-ti-16gb" in told


@pytest.mark.parametrize(
    ("gpu", "wishes", "said"),
    [
        (
            "rtx-4090",
            {},
            r"\$\d.* for the \d.* planned, at \$0.39 a GPU-hour \(Akash, on-demand, 2026-09-20\)$",
        ),
        ("rtx-4090", {"price_usd_per_hour": 2.0}, r"\$\d.* for the \d.* planned, at \$2 a GPU-hour$"),
        ("16GB", {}, "not known for rtx-5060-ti-16gb$"),
    ],
)
def test_a_run_s_price_has_its_source_and_date_or_is_said_to_be_unknown(
    gpu: str, wishes: dict[str, float], said: str
) -> None:
    data = str(PROFILES / "demo" / "data" / "train.jsonl")
    plan = make_plan(
        make_request("llama-3.2-1b", gpu=gpu, data=data, num_train_epochs=300.0, **wishes), whole=False
    )
    assert re.match(f"price: {said}", planned(plan, whole=True)[0])
    assert " planned" not in planned(plan, whole=False)[0]
