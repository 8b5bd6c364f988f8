"""Accuracy and calibrate: one's own runs beside predictions, and measuring in sight."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from textual.widgets import DataTable, Input, ProgressBar

from launcher.tui.measured import calibrating
from launcher.tui.screens.accuracy import AccuracyScreen
from launcher.tui.screens.calibrate import CalibrateScreen
from launcher.tui.screens.confirm import Confirm
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.widgets.run.line_plot import LinePlot
from launcher.tui.widgets.run.log_lines import LogLines
from planner.base.data_files import PROFILES, user_data_dir
from planner.calibration.records import append_record, read_records

from .conftest import MakeApp, settle
from .test_sizing_screen import shown_text

CALIBRATION = """
import json, sys, time, signal
signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted; fitting what was measured"))
print("[1/2] measuring a", file=sys.stderr, flush=True)
if sys.argv[1] == "5":
    time.sleep(60)
print("[2/2] a: ok", file=sys.stderr, flush=True)
errors = [("a", 0.001, 0.01, 0.02), ("b", 0.0, -0.03, None), ("a", -0.002, 0.0, 0.0)]
rows = [{"model": m, "allocated_error": a, "reserved_error": r, "process_error": p} for m, a, r, p in errors]
print(json.dumps({"residuals": rows}))
"""


async def test_own_runs_stand_beside_what_was_predicted_and_this_gpu_is_measured_in_sight(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    app = make_app(model="qwen2.5-0.5b")
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("escape", "e")
        await settle(pilot)
        assert isinstance(app.screen, AccuracyScreen)
        assert "no run of yours has been measured on a GPU yet" in shown_text(pilot)
        await pilot.press("escape")
        every = read_records(PROFILES / "runs" / "calibrate-h200.jsonl")
        shipped = [record for record in every if record.isolated][:2]
        own = user_data_dir() / "runs" / "train.jsonl"
        for record in shipped:
            append_record(own, record)
        other = dataclasses.replace(shipped[0], id="elsewhere", predicted=None)
        kept = tmp_path / "runs" / "elsewhere" / "record.json"
        kept.parent.mkdir(parents=True)
        kept.write_text(json.dumps(other.to_dict()))
        (kept.parent.parent / "broken").mkdir()
        (kept.parent.parent / "broken" / "record.json").write_text("[")
        await pilot.press("e")
        await settle(pilot)
        text, table = shown_text(pilot), app.screen.query_one(DataTable)
        assert "3 runs of yours" in text
        assert re.search(r"memory, GiB: median [\d.]+%, worst [+-][\d.]+% of 2", text)
        rows = {str(table.get_row_at(at)[0]): table.get_row_at(at) for at in range(table.row_count)}
        for record in shipped:
            step, told = record.phase("step"), record.predicted
            assert step is not None
            assert step.process_bytes is not None
            assert told is not None
            error = told.process_bytes / step.process_bytes - 1
            assert str(rows[record.id][1]).endswith(f" {error:+.1%}")
            assert str(rows[record.id][2]) == f"{step.process_bytes / 2**30:.2f}"
            assert str(rows[record.id][4])[0] in "✓!"
        assert str(rows["elsewhere"][1]) == "-"
        marks = app.screen.query_one("#accuracy-memory", expect_type=None).query_one(LinePlot).data.marks
        assert len(marks) == 2

        await pilot.press("b")
        await settle(pilot)
        screen = app.screen
        assert isinstance(screen, CalibrateScreen)
        screen.query_one("#calibrate-minutes", Input).value = "0"
        await pilot.press("ctrl+s")
        assert "minutes: '0' is not accepted: 0.1 to 1,440" in shown_text(pilot)
        monkeypatch.setattr(
            calibrating, "command_line", lambda minutes: [sys.executable, "-c", CALIBRATION, f"{minutes:g}"]
        )
        screen.query_one("#calibrate-minutes", Input).value = "2"
        await pilot.press("ctrl+s")
        await settle(pilot)
        text = shown_text(pilot)
        assert "done: plans rest on these runs from now on" in text
        assert "3 runs, each beside a fit without its model; reserved -3.00% at worst" in text
        assert screen.query_one(LogLines).text == "measuring a\na: ok"
        assert screen.query_one(LinePlot).data.marks == ((1.0, 1.0), (2.0, -3.0), (3.0, 0.0))
        # One that takes long is left only when one says so, and then told to end as by Ctrl-C.
        screen.query_one("#calibrate-minutes", Input).value = "5"
        await pilot.press("ctrl+s")
        while "measuring a" not in screen.query_one(LogLines).text:
            await pilot.pause(0.02)
        assert screen.measuring
        assert screen.query_one(ProgressBar).percentage == 0.5
        await pilot.press("escape")
        assert isinstance(app.screen, Confirm)
        await pilot.press("escape", "s")
        await settle(pilot)
        assert "! interrupted; fitting what was measured" in shown_text(pilot)
        assert not screen.measuring
        await pilot.press("escape", "escape")
        assert isinstance(app.screen, SizingScreen)
