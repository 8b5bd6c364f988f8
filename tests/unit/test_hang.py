"""What is a hang and what only takes long, on a clock of the test's own."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

import pytest

from launcher.runs.heartbeat import HeartbeatWriter
from launcher.runs.minding.hang import LONGEST_TICK_SECONDS, HangLimits, HangWatch, Silence, percentile_99

TICK = 1.0


class Clock:
    """A trainer and its watcher on one clock."""

    def __init__(self, path: Path, limits: HangLimits | None = None) -> None:
        self.now = 1000.0
        self.path = path
        self.watch = HangWatch(path, limits or HangLimits())
        self.beats = 0

    def beat(self, stage: str, step: int) -> None:
        with HeartbeatWriter(self.path) as writer:
            writer.beat(stage, step)

    def wait(self, seconds: float) -> Silence | None:
        """Let time pass under the watcher's eyes; the first silence that it tells."""
        end = self.now + seconds
        while self.now < end:
            self.now += TICK
            found = self.watch.tick(self.now)
            if found is not None:
                return found
        return None

    def train(self, steps: int, seconds: float) -> None:
        for step in range(steps):
            self.beat("training", step)
            assert self.wait(seconds) is None


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "heartbeat.json")


def test_a_minute_of_silence_is_a_hang_where_steps_are_short(clock: Clock) -> None:
    clock.train(10, 1.0)
    assert clock.wait(55) is None
    found = clock.wait(10)
    assert found is not None
    assert (found.stage, found.step, found.limit_seconds) == ("training", 9, 60.0)
    # A clock's sum of tenths reaches the limit a beat early or late.
    assert re.search(r"no sign of life for 6[01] s while training, after step 9", str(found))


def test_ten_times_the_longest_steps_are_allowed_where_they_are_long(clock: Clock) -> None:
    clock.train(10, 20.0)
    assert clock.wait(170) is None
    found = clock.wait(40)
    assert found is not None
    assert found.limit_seconds == pytest.approx(200.0, rel=0.05)


def test_the_first_steps_and_other_stages_have_limits_of_their_own(clock: Clock) -> None:
    limits = HangLimits()
    for stage, limit in (
        ("loading", limits.loading_seconds),
        ("compiling", limits.compiling_seconds),
        ("saving", limits.saving_seconds),
        ("training", limits.unmeasured_seconds),
        ("evaluating", limits.unmeasured_seconds),
        ("a stage of another version", limits.unmeasured_seconds),
    ):
        clock.beat(stage, 1)
        assert clock.wait(limit - 5) is None
        found = clock.wait(10)
        assert found is not None, stage
        assert found.stage == stage


def test_who_waits_for_room_on_the_disk_does_not_hang(clock: Clock) -> None:
    clock.beat("waiting", 5)
    assert clock.wait(9_000) is None


def test_a_trainer_that_never_beats_is_loading(clock: Clock) -> None:
    assert clock.wait(3590) is None
    found = clock.wait(20)
    assert found is not None
    assert found.stage == "loading"


def test_batches_of_an_evaluation_are_measured_apart_from_steps(clock: Clock) -> None:
    clock.train(10, 1.0)
    for _ in range(10):
        clock.beat("evaluating", 10)
        assert clock.wait(30.0) is None
    assert clock.wait(200) is None
    found = clock.wait(150)
    assert found is not None
    assert found.stage == "evaluating"


@pytest.mark.parametrize("gap", [3600.0, 86400.0, -50.0])
def test_time_that_nobody_lived_through_is_no_silence(clock: Clock, gap: float) -> None:
    """The machine was suspended, the container frozen, or the clock is not what it seemed."""
    clock.train(10, 1.0)
    clock.now += gap
    assert clock.watch.tick(clock.now) is None
    # And it is not taken for a long step either.
    clock.train(10, 1.0)
    found = clock.wait(90)
    assert found is not None
    assert found.limit_seconds <= 10 * (LONGEST_TICK_SECONDS + 2)


def test_the_percentile_is_one_of_the_values() -> None:
    assert percentile_99(deque([5.0])) == 5.0
    assert percentile_99(deque(map(float, range(1, 101)))) == 99.0
    assert percentile_99(deque([1.0] * 999 + [500.0])) == 1.0
