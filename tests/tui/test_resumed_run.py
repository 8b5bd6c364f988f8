"""A run that went on from a checkpoint, as the run screen follows it."""

from __future__ import annotations

from pathlib import Path

from launcher.runs.events import AttemptEvent, EndEvent, EventWriter, LogEvent, StartEvent
from launcher.runs.folder import RunFolder
from launcher.runs.report.series import CoalescedSeries
from launcher.tui.run_follower import RunFollower


def test_a_series_forgets_what_is_done_again() -> None:
    series = CoalescedSeries(capacity=8)
    for x in range(1, 8):
        series.add(x, float(x))
    series.drop_after(4)
    series.add(5, 50.0)
    assert series.points() == ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0))
    for x in range(6, 30):
        series.add(x, float(x))
    series.drop_after(20)
    assert max(x for x, _ in series.points()) <= 20


def test_losses_of_steps_that_are_done_again_are_shown_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    follower = RunFollower(folder)
    with EventWriter(folder.events) as writer:

        def train(number: int, first: int, last: int) -> None:
            writer.write(AttemptEvent(time=1.0, number=number, reason="resume", from_step=first))
            writer.write(StartEvent(time=1.0, total_steps=9, environment={}, first_step=first))
            for step in range(first + 1, last + 1):
                writer.write(
                    LogEvent(
                        time=1.0,
                        step=step,
                        loss=float(10 * number + step),
                        learning_rate=None,
                        grad_norm=None,
                        tokens_per_second=None,
                        step_seconds=1.0,
                    )
                )

        train(1, 0, 5)
        writer.write(EndEvent(time=1.0, state="oom", message="", step=5))
        assert follower.poll().state == "oom"
        train(2, 3, 4)
    now = follower.poll()
    assert now.losses == ((1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0))
    assert (now.state, now.step) != ("oom", 5)
    assert now.step == 4
