"""Advice: each rule speaks once where it should, and never in a healthy run."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.follow import SHOWN_BYTES
from launcher.runs.events import (
    AttemptEvent,
    EndEvent,
    EvalEvent,
    Event,
    LogEvent,
    SampleEvent,
    StartEvent,
    WarningEvent,
    to_line,
)
from launcher.runs.report.advice import OF_LOSSES, OF_SAMPLES, Adviser, advise
from planner.answers.plan import Plan
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request

from .test_run_record import ON_GPU, run_with

Cli = Callable[..., Any]
GIB = 2**30
STEPS = 400


def healthy(step: int) -> float:
    return 1.2 + 1.4 * math.exp(-step / 60)


def run(
    loss: Callable[[int], float], steps: int = STEPS, seconds: float = 1.0, noise: float = 0.08
) -> list[Event]:
    """A run's events, with as much noise as a batch of 16 has."""
    drawn = random.Random(7)
    events: list[Event] = [StartEvent(time=0.0, total_steps=steps, environment={})]
    for step in range(1, steps + 1):
        events.append(
            LogEvent(
                time=step * seconds,
                step=step,
                loss=loss(step) * (1 + drawn.gauss(0, noise)),
                learning_rate=1e-4,
                grad_norm=1.0,
                tokens_per_second=100.0,
                step_seconds=seconds,
            )
        )
    return events


def samples(seconds: int = STEPS, **changes: Any) -> list[Event]:
    values = {
        "used_bytes": 14 * GIB,
        "total_bytes": 16 * GIB,
        "process_bytes": 13 * GIB,
        "utilization_percent": 97.0,
        "temperature_c": 70.0,
        "power_w": 300.0,
        "host_percent": 60.0,
    }
    return [SampleEvent(time=second + 0.5, **{**values, **changes}) for second in range(seconds)]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(make_request("qwen2.5-0.5b", gpu="16GB", knobs={"max_length": 512}))


def rules(events: list[Event], sampled: list[Event], plan: Plan | None = None) -> list[str]:
    return [advice.rule for advice in advise(events, sampled, plan)]


@pytest.mark.parametrize("noise", [0.0, 0.08, 0.2])
@pytest.mark.parametrize("steps", [12, 60, STEPS, 3000])
def test_a_healthy_run_is_left_in_peace(noise: float, steps: int, plan: Plan) -> None:
    events = run(healthy, steps, noise=noise)
    evaluations = [EvalEvent(time=s + 0.1, step=s, loss=healthy(s) + 0.05) for s in range(20, steps, 20)]
    end = EndEvent(time=steps + 1.0, state="finished", message="", step=steps)
    assert rules([*events, *evaluations, end], samples(min(steps, 600)), plan) == []


SERIES: dict[str, Callable[[int], float]] = {
    "blown up": lambda step: 3.8 if step < 40 else 6.2,
    "rises": lambda step: healthy(step) if step < 200 else healthy(200) * min(1.25, 1 + (step - 200) / 100),
    "stands still": lambda step: 2.4,
}


@pytest.mark.parametrize("rule", sorted(SERIES))
def test_losses_that_go_wrong_are_told_once(rule: str) -> None:
    noise = 0.03
    assert rules(run(SERIES[rule], noise=noise), []) == [rule]


def test_a_short_run_that_ends_worse_than_it_began_does_not_pass_without_a_word() -> None:
    events = run(lambda step: 3.8 if step < 3 else 6.2, steps=6, noise=0.0)
    assert rules(events, []) == []
    (advice,) = advise([*events, EndEvent(time=9.0, state="finished", message="", step=6)], [], None)
    assert "from 3.8 to 6.2" in advice.message
    assert "learning rate" in advice.message


def test_learning_by_heart_is_told_by_the_evaluations() -> None:
    def evaluation(step: int) -> EvalEvent:
        return EvalEvent(time=step + 0.1, step=step, loss=1.5 + abs(step - 100) / 400)

    events = sorted([*run(healthy), *map(evaluation, range(50, STEPS, 50))], key=lambda event: event.time)
    (advice,) = advise(events, [], None)
    assert advice.rule == "overfits"
    assert "1.5 at step 100" in advice.message


@pytest.mark.parametrize(
    ("changes", "rule", "said"),
    [
        ({"utilization_percent": 40.0, "host_percent": 99.0}, "idles", "the host, at 99% of a core"),
        ({"utilization_percent": 40.0, "host_percent": 9.0}, "idles", "waits for something else"),
        ({"utilization_percent": 40.0, "host_percent": None}, "idles", "used 40%"),
        ({"slowed_by": "heat", "temperature_c": 91.0}, "slowed", "too hot, at 91 C"),
        ({"slowed_by": "power"}, "slowed", "power supply"),
    ],
)
def test_samples_tell_which_side_is_slow(changes: dict[str, Any], rule: str, said: str) -> None:
    (advice,) = advise(run(healthy), samples(**changes), None)
    assert advice.rule == rule
    assert said in advice.message


def test_loading_and_compiling_are_no_idling() -> None:
    events = [dataclasses.replace(event, time=event.time + 130) for event in run(healthy, steps=20)]
    idle = samples(130, utilization_percent=0.0)
    busy = [dataclasses.replace(one, time=one.time + 130) for one in samples(20)]
    assert rules(events, [*idle, *busy]) == []


def test_a_full_card_with_steps_of_three_times_the_plan_spills_to_the_host(plan: Plan) -> None:
    assert plan.speed is not None
    planned = plan.speed.seconds_per_optimizer_step
    full = samples(used_bytes=int(15.8 * GIB), process_bytes=int(14.8 * GIB))
    # Of a second each on the clock of the samples, whatever their own figure says.
    slow = [
        dataclasses.replace(event, step_seconds=4 * planned) if isinstance(event, LogEvent) else event
        for event in run(healthy)
    ]
    assert rules(slow, full, plan) == ["spills"]
    assert rules(slow, samples(), plan) == []
    assert rules(run(healthy, seconds=1.0), full, None) == []


def test_memory_that_others_take_is_told() -> None:
    before = samples(100)
    after = [dataclasses.replace(one, time=one.time + 100) for one in samples(50, used_bytes=int(15.2 * GIB))]
    (advice,) = advise(run(healthy), [*before, *after], None)
    assert advice.rule == "shared"
    assert "1.20 GiB" in advice.message


def resumed(step: int, events: list[Event]) -> list[Event]:
    """An attempt that goes on from a step, and what is logged then."""
    begun = AttemptEvent(time=STEPS + 1.0, number=2, reason="resume", from_step=step)
    later: list[Event] = [
        dataclasses.replace(e, time=STEPS + 2.0 + e.step, step=step + e.step)
        for e in events
        if isinstance(e, LogEvent)
    ]
    return [begun, StartEvent(time=STEPS + 1.5, total_steps=step + len(later), environment={}), *later]


@pytest.mark.parametrize("step", [STEPS // 2, STEPS])
def test_an_attempt_that_goes_on_is_no_new_beginning(step: int) -> None:
    """Its first losses are where the run stands, and say nothing of where it began."""
    lucky = [1.0, 0.9, 1.0]

    def loss(step: int) -> float:
        return lucky[step - 1] if step <= len(lucky) else 1.35

    end = EndEvent(time=STEPS + 99.0, state="finished", message="", step=step + 9)
    for steps in (9, 30):
        events = [*run(healthy), *resumed(step, run(loss, steps=steps, noise=0.0)), end]
        assert rules(events, []) == [], steps


def test_an_attempt_that_goes_on_and_unlearns_is_told_from_where_the_run_began() -> None:
    events = [*run(healthy, noise=0.0), *resumed(STEPS, run(lambda step: 6.2, steps=30, noise=0.0))]
    (advice,) = advise(events, [], None)
    assert f"the loss went from {healthy(2):.3g} to 6.2" in advice.message


def test_what_an_attempt_does_again_from_the_start_is_a_new_beginning() -> None:
    events = [*run(lambda step: 6.2, steps=8, noise=0.0), *resumed(0, run(lambda step: 6.2, steps=30))]
    assert rules([*run(healthy, steps=20), *events[8:]], []) == []


def test_advice_costs_little_in_a_long_run() -> None:
    """Looks are rarer as a run grows: 30,000 steps are looked at some 500 times."""
    adviser, looks = Adviser(), 0
    counted = tuple((name, lambda seen: None) for name, _ in OF_LOSSES)

    def count(seen: Any) -> None:
        nonlocal looks
        looks += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.runs.report.advice.OF_LOSSES", (("x", count), *counted))
        for event in run(healthy, steps=30_000):
            list(adviser.take(event))
    assert 100 < looks < 1000


@pytest.mark.parametrize("rule", sorted(SERIES))
def test_who_comes_late_is_told_nothing_of_losses_whose_first_ones_are_not_known(rule: str) -> None:
    """Of a run that began at 3.8 and fell, its last steps alone may look like one that stands still."""
    end = EndEvent(time=STEPS + 1.0, state="finished", message="", step=STEPS)
    evaluation = EvalEvent(time=STEPS + 0.5, step=STEPS, loss=9.0)
    late = Adviser(from_start=False)
    for event in (*run(SERIES[rule], noise=0.0), evaluation, end):
        assert list(late.take(event)) == []
    # What the GPU does needs no beginning.
    hot = samples(slowed_by="heat", temperature_c=91.0)
    assert [one.rule for event in hot for one in late.take(event)] == ["slowed"]


@pytest.mark.parametrize("is_long", [False, True], ids=["from its first event on", "from the middle on"])
def test_following_late_tells_it_in_the_report_at_the_end(cli: Cli, tmp_path: Path, is_long: bool) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    events = run(SERIES["blown up"], noise=0.0)
    folder.events.write_text("".join(map(to_line, events)))
    if is_long:
        note = to_line(WarningEvent(time=1.0, message="x" * 1000))
        folder.events.write_text(
            "".join([*map(to_line, events[:60]), note * 300, *map(to_line, events[60:])])
        )
        assert folder.events.stat().st_size > SHOWN_BYTES
    folder.lock_file("trainer").touch()
    finished = cli("runs", "follow", "run", "--runs", tmp_path)
    assert ("advice: " in finished.err) != is_long
    assert "learning rate" in finished.out
    assert "## Advice" in folder.report_page.read_text()


def test_every_rule_is_in_the_documentation() -> None:
    table = (Path(__file__).resolve().parents[2] / "docs" / "advice.md").read_text()
    names = [name for name, _ in (*OF_LOSSES, *OF_SAMPLES)]
    assert [name for name in names if f"\n| {name} |" not in table] == []


def test_advice_is_in_the_report(tmp_path: Path) -> None:
    from launcher.runs.report.writing import write_report

    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    folder.events.write_text("".join(map(to_line, run(SERIES["blown up"], noise=0.0))))
    report = write_report(folder)
    assert len(report.advice) == 1
    assert "## Advice" in folder.report_page.read_text()
