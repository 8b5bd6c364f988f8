"""The runs as a table: what each row says, sorting, filtering, comparing, deleting, and back to sizing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from launcher.runs.events import AdapterEvent, StageEvent
from launcher.runs.folder import RunFolder
from launcher.tui import run_follower
from launcher.tui.run_follower import RunFollower
from launcher.tui.run_rows import COLUMNS, RowReader, sorted_rows
from launcher.tui.screens.compare_runs import CompareRuns, differences
from launcher.tui.screens.confirm import Confirm
from launcher.tui.screens.run import RunScreen
from launcher.tui.screens.runs import RunsScreen
from launcher.tui.text import number
from launcher.tui.widgets.run.charts import smoothed, speed_title
from launcher.tui.widgets.run.log_lines import LogLines
from launcher.tui.widgets.run.log_tail import unfolded
from launcher.tui.widgets.run.result_panel import ResultPanel
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request

from . import synthetic
from .conftest import MakeApp, settle
from .test_run_screen import see
from .test_sizing_screen import screen_of, shown_text


def over(path: Path, *, state: str = "finished", **changes: object) -> RunFolder:
    """A run that has ended at step 240, with its stages and an adapter."""
    folder = synthetic.half_way(path)
    begun = synthetic.START
    stages = (("loading", -95), ("rehearsing", -50), ("training", 0))
    told = [StageEvent(time=begun + at, stage=stage) for stage, at in stages]
    events = folder.events.read_text()
    folder.events.write_text("")
    synthetic.append(folder.events, *told)
    with folder.events.open("a") as file:
        file.write(events)
    folder.adapter.mkdir()
    synthetic.append(
        folder.events,
        AdapterEvent(time=begun + 2410, step=240, path="adapter"),
        synthetic.end(state, 240),
    )
    job = folder.read_job()
    job = dataclasses.replace(job, setup=job.setup.replace(**changes))
    folder.job.write_text(json.dumps(job.to_dict()))
    return folder


def cells(pilot: Pilot[None], column: str) -> list[str]:
    table = pilot.app.screen.query_one(DataTable)
    return [str(cell) for cell in table.get_column(column)]


async def test_runs_are_sorted_filtered_compared_loaded_and_deleted(
    make_app: MakeApp, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b" * 400}) + "\n")
    over(root / "first", lora_r=64)
    second = over(root / "second", state="stopped")
    job = dataclasses.replace(second.read_job(), data_path=str(data), num_train_epochs=7.0)
    second.job.write_text(json.dumps(job.to_dict()))
    synthetic.make_folder(root / "third", model="qwen2.5-0.5b")
    app = make_app(model="qwen2.5-0.5b")
    async with app.run_test(size=(150, 24), notifications=True) as pilot:
        await settle(pilot)
        await pilot.press("o")
        await settle(pilot)
        assert isinstance(app.screen, RunsScreen)
        assert set(cells(pilot, "run")) == {"first", "second", "third"}
        assert cells(pilot, "state").count("finished") == 1
        assert "240/400" in cells(pilot, "steps")
        assert {"1.265", "-"} == set(cells(pilot, "loss"))
        assert "1.274" in cells(pilot, "evaluation")
        assert "14.0" in cells(pilot, "peak")
        assert "41m 35s" in cells(pilot, "took")
        # By the next column, and turned.
        while "run ▲" not in shown_text(pilot):
            await pilot.press("s")
        assert cells(pilot, "run") == ["first", "second", "third"]
        await pilot.press("S")
        assert cells(pilot, "run") == ["third", "second", "first"]
        # Two beside each other: only what differs.
        await pilot.press("ctrl+end", "space", "up", "c")
        await settle(pilot)
        assert isinstance(app.screen, CompareRuns)
        told = str(app.screen.query_one("#compare-table", Static).content)
        assert "lora_r                      64  ·  16" in told
        assert "max_length" not in told
        await pilot.press("escape")
        # What goes on is not deleted, what is over only when that is said.
        await pilot.press("x")
        assert isinstance(app.screen, Confirm)
        await pilot.press("n")
        await settle(pilot)
        assert second.path.exists()
        await pilot.press("slash", *"qlora first", "escape", "ctrl+end", "x", "y")
        await settle(pilot)
        assert not (root / "first").exists()
        await settle(pilot)
        app.screen._poll()  # type: ignore[attr-defined]
        await settle(pilot)
        assert cells(pilot, "run") == ["third", "second"]
        # And back into sizing, with the data and passes of the run.
        await pilot.press("ctrl+end", "l")
        await settle(pilot)
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        assert sizing.setup == second.read_job().setup
        assert sizing.wishes.data is not None
        assert sizing.wishes.data.path == str(data)
        assert sizing.wishes.num_train_epochs == 7


async def test_a_run_that_is_over_says_what_it_came_to_and_how_to_go_on(
    make_app: MakeApp, tmp_path: Path
) -> None:
    folder = over(tmp_path / "run")
    plan = make_plan(make_request("qwen2.5-14b", gpu="16GB", knobs={"max_length": 4096}), whole=False)
    folder.plan.write_text(json.dumps(plan.to_dict()))
    async with make_app(run=folder).run_test(size=(120, 40), notifications=True) as pilot:
        screen = await see(pilot)
        told = str(screen.query_one(ResultPanel).render())
        assert "41m 35s for 240 steps" in told
        assert "evaluation 1.274 at best, after step 240" in told
        assert f"{folder.adapter}, as it was after step 240" in told
        assert f"peak 14.0 GiB, planned {plan.memory.peak_bytes / 2**30:.1f} GiB" in told
        assert "✔ the longest micro-batch f… 50 s" in shown_text(pilot)
        assert "Stop" not in shown_text(pilot)
        await pilot.press("1")
        assert pilot.app.clipboard == f"vramwise merge {folder.path}"
        await pilot.press("r")
        await settle(pilot)
        assert "It cannot go on" in shown_text(pilot)
        assert isinstance(pilot.app.screen, RunScreen)


async def test_the_log_has_the_runs_own_lines_warnings_folded_and_is_searched(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)
    folder = synthetic.half_way(tmp_path / "run")
    noise = "/x/y.py:12: FutureWarning: [b]this[/b] will change\n  warnings.warn('x')\n"
    folder.log("trainer").write_text(noise * 4 + "loading in 4 bits: done\n" + noise)
    async with make_app(run=folder).run_test(size=(40, 12)) as pilot:
        screen = await see(pilot)
        text = screen.query_one(LogLines).text
        assert "FutureWarning" not in text
        assert "▸ 10 lines of warnings of libraries" in text
        assert "step 240 of 400  loss 1.265  1,468 tokens/s" in text
        assert "step 240: evaluation loss 1.274" in text
        await pilot.press("w")
        assert "FutureWarning: [b]this[/b]" in screen.query_one(LogLines).text
        await pilot.press("slash", *"STEP 23", "enter")
        text = screen.query_one(LogLines).text
        assert "step 239 of" in text
        assert "step 240 of" not in text
        assert "11 lines with 'STEP 23'" in text
        await pilot.press("escape")
        assert "step 240 of" in screen.query_one(LogLines).text


def test_the_time_left_has_the_range_of_the_recent_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)
    folder = synthetic.make_folder(tmp_path / "run")
    paces = [4.0, 4.0, 2.0, 6.0, 4.0, 5.0, 3.0]
    logs = [synthetic.log(step, step_seconds=pace) for step, pace in enumerate(paces, 1)]
    synthetic.append(folder.events, synthetic.start(107), *logs)
    left = RunFollower(folder, clock=lambda: 0.0).poll().left
    assert left is not None
    assert (left.seconds, left.low, left.high) == (400.0, 300.0, 500.0)


def test_each_gpu_of_several_has_its_course(tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    gib = synthetic.GIB
    synthetic.append(
        folder.samples,
        *(synthetic.sample(s, gpus={"0": [s * gib, 1, 90.0], "1": [2 * gib, 1, None]}) for s in (1, 2)),
    )
    snapshot = RunFollower(folder).poll()
    assert dict(snapshot.curves.gpus)["0"][-1] == (synthetic.START + 2, 2 * gib)
    assert dict(snapshot.curves.gpus)["1"][-1] == (synthetic.START + 2, 2 * gib)
    assert len(snapshot.curves.temperatures) > 1


def test_a_smoothed_curve_keeps_its_ends_in_bounds_and_lags_no_level() -> None:
    level = tuple((float(x), 3.0) for x in range(100))
    assert smoothed(level) == level
    noisy = tuple((float(x), 1.0 + (x % 2)) for x in range(1000))
    tail = [y for _, y in smoothed(noisy)][200:]
    assert 1.4 < min(tail) <= max(tail) < 1.6


def test_a_forecast_for_a_gpu_is_not_held_beside_a_run_on_the_cpu(tmp_path: Path) -> None:
    folder = over(tmp_path / "run")
    plan = make_plan(make_request("qwen2.5-14b", gpu="16GB", knobs={"max_length": 4096}), whole=False)
    folder.plan.write_text(json.dumps(plan.to_dict()))
    assert plan.speed is not None
    assert f"forecast {number(plan.speed.tokens_per_second)}" in speed_title(RunFollower(folder).poll())
    synthetic.append(folder.events, *(synthetic.memory(p, 1, None) for p in ("load", "step", "evaluation")))
    assert "forecast" not in speed_title(RunFollower(folder).poll())


def test_warnings_of_libraries_are_folded_with_their_source_lines() -> None:
    kept, folded = unfolded(["a", "x.py:1: UserWarning: u", "  warnings.warn(", "b", "  indented"])
    assert (kept, folded) == (["a", "b", "  indented"], 2)


def test_rows_without_a_figure_are_sorted_last_either_way(tmp_path: Path) -> None:
    reader = RowReader()
    rows = [reader.read(over(tmp_path / "b")), reader.read(synthetic.make_folder(tmp_path / "a"))]
    found = [row for row in rows if row is not None]
    loss = next(column for column in COLUMNS if column.key == "loss")
    for turned in (False, True):
        assert [row.name for row in sorted_rows(found, loss, turned=turned)] == ["b", "a"]


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    one = over(tmp_path / "a", lora_r=64).read_job()
    other = dataclasses.replace(one, setup=one.setup.replace(lora_r=16), seed=7)
    assert [name for name, *_ in differences(one, other)] == ["lora_r", "seed"]
