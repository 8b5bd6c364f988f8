from __future__ import annotations

import math
from pathlib import Path

import pytest

from launcher.runs.events import WarningEvent, to_line
from launcher.runs.report.series import CoalescedSeries
from launcher.runs.tail import MAX_LINE_BYTES, LineTail, last_lines
from launcher.tui import run_facts, run_follower
from launcher.tui.run_follower import RunFollower

from . import synthetic


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)


def test_a_run_that_was_never_started(tmp_path: Path) -> None:
    snapshot = RunFollower(synthetic.make_folder(tmp_path / "run")).poll()
    assert snapshot.state == "created"
    assert not snapshot.over


def test_a_dead_run_without_an_end_was_killed(tmp_path: Path) -> None:
    snapshot = RunFollower(synthetic.half_way(tmp_path / "run")).poll()
    assert snapshot.state == "killed"
    assert snapshot.step == 240
    assert "240" in snapshot.message
    assert snapshot.over


@pytest.mark.usefixtures("alive")
def test_a_live_run_grows_and_ends(tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    follower = RunFollower(folder, clock=lambda: 100.0)
    assert follower.poll().state == "starting"
    synthetic.append(folder.events, synthetic.start(10), synthetic.log(1), synthetic.log(2))
    snapshot = follower.poll()
    assert (snapshot.state, snapshot.step, snapshot.total_steps) == ("running", 2, 10)
    assert snapshot.seconds_left == pytest.approx(8 * 4.0)
    folder.stop.touch()
    assert follower.poll().state == "stopping"
    synthetic.append(folder.events, synthetic.end("stopped", 3, "asked for"))
    snapshot = follower.poll()
    assert (snapshot.state, snapshot.step, snapshot.message) == ("stopped", 3, "asked for")
    assert snapshot.seconds_left is None
    assert snapshot.over


@pytest.mark.usefixtures("alive")
def test_time_left_counts_on_the_monotonic_clock_and_not_on_event_times(tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    now = [50.0]
    follower = RunFollower(folder, clock=lambda: now[0])
    # The wall clock of the trainer jumps back by an hour between two steps.
    synthetic.append(
        folder.events,
        synthetic.start(10),
        synthetic.log(1),
        synthetic.log(2, time=synthetic.START - 3600),
    )
    assert follower.poll().seconds_left == pytest.approx(32.0)
    now[0] += 3.0
    assert follower.poll().seconds_left == pytest.approx(29.0)


def test_a_partial_last_line_waits_for_its_end(tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    line = to_line(synthetic.log(1))
    folder.events.write_text(to_line(synthetic.start()) + line[:20])
    follower = RunFollower(folder)
    assert follower.poll().step == 0
    with folder.events.open("a") as file:
        file.write(line[20:])
    assert follower.poll().step == 1


def test_a_replaced_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    folder = synthetic.half_way(tmp_path / "run")
    follower = RunFollower(folder)
    assert follower.poll().step == 240
    folder.events.unlink()
    synthetic.append(folder.events, synthetic.start(5), synthetic.log(1))
    snapshot = follower.poll()
    assert (snapshot.step, snapshot.total_steps) == (1, 5)
    assert len(snapshot.losses) == 1


def test_a_large_file_is_read_in_slices(tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    synthetic.append(folder.events, synthetic.start(5000), *(synthetic.log(step) for step in range(1, 5001)))
    follower = RunFollower(folder)
    follower._events.tail.slice_bytes = 50_000
    polls = 1
    while (snapshot := follower.poll()).behind:
        assert not snapshot.over
        polls += 1
    assert polls > 10
    assert snapshot.step == 5000
    assert len(snapshot.losses) <= 1024


def test_a_series_of_a_million_points_stays_small_and_true() -> None:
    series = CoalescedSeries(capacity=512)
    for x in range(1_000_000):
        series.add(x, float(x))
    points = series.points()
    assert 256 <= len(points) <= 513
    assert points[-1][0] == 999_999
    assert sum(y for _, y in points) / len(points) == pytest.approx(500_000, rel=0.02)
    series.add(math.nan, 1.0)
    series.add(1e6, math.inf)
    assert len(series.points()) == len(points)


def test_lines_of_any_length_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * (3 * MAX_LINE_BYTES) + b"\nshort\n")
    tail = LineTail(path, slice_bytes=MAX_LINE_BYTES)
    lines = []
    while True:
        lines += tail.read_new()
        assert len(tail._partial) <= MAX_LINE_BYTES
        if not tail.behind:
            break
    assert lines == [b"short"]


def test_figures_of_a_wrong_type_are_left_out(tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    folder.events.write_text(
        '{"time": 1, "kind": "start", "total_steps": "many", "environment": {}}\n'
        '{"time": 1, "kind": "log", "step": 1, "loss": "low", "learning_rate": null, "grad_norm": [], '
        '"tokens_per_second": {}, "step_seconds": "x"}\n'
        "not json\n[1]\n\xff\n"
    )
    snapshot = RunFollower(folder).poll()
    assert snapshot.total_steps is None
    assert snapshot.losses == ()
    assert snapshot.warning_count == 5


def test_warnings_are_counted_and_the_last_are_kept(tmp_path: Path) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    synthetic.append(folder.events, *(WarningEvent(time=1.0, message=f"w{i}") for i in range(1000)))
    snapshot = RunFollower(folder).poll()
    assert snapshot.warning_count == 1000
    assert len(snapshot.warnings) == run_facts.WARNINGS
    assert snapshot.warnings[-1] == "w999"


def test_the_log_shows_what_a_progress_bar_came_to(tmp_path: Path) -> None:
    path = tmp_path / "trainer.log"
    path.write_bytes(b"first\n 10%\r 50%\r100%\nlast without end")
    assert last_lines(path, 10) == ("first", "100%", "last without end")


def test_a_prediction_is_worked_out_when_the_run_has_no_plan(tmp_path: Path) -> None:
    snapshot = RunFollower(synthetic.half_way(tmp_path / "run")).poll()
    assert snapshot.prediction is not None
    assert snapshot.prediction.plan is None
    assert {phase.name for phase in snapshot.prediction.memory.phases} >= {"load", "step"}
