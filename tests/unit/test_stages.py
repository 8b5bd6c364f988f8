"""What a run does from its first second on: told as events and beats, shown with the time it has lasted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launcher.commands.follow import _Line
from launcher.runs.events import Event, StageEvent
from launcher.runs.heartbeat import HeartbeatWriter, read_beat
from launcher.runs.report.stages import STAGES, seconds, stage_text
from launcher.training.stages import Stages, compiling_words
from planner.answers.plan import Plan
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request


def test_a_change_of_stage_is_an_event_and_every_call_a_beat(tmp_path: Path) -> None:
    events: list[Event] = []
    with HeartbeatWriter(tmp_path / "heartbeat.json") as writer:
        stages = Stages(events.append, writer.beat)
        stages.enter("loading", "reading the data")
        stages.enter("loading", "loading the weights")
        for step in (0, 0, 1):
            stages.beat("training", step)
        stages.beat("saving", 1)
    told = [(event.stage, event.message) for event in events if isinstance(event, StageEvent)]
    assert told == [
        ("loading", "reading the data"),
        ("loading", "loading the weights"),
        ("training", ""),
        ("saving", ""),
    ]
    beat = read_beat(tmp_path / "heartbeat.json")
    assert beat is not None
    assert (beat.stage, beat.step) == ("saving", 1)


def test_stages_are_told_in_words() -> None:
    for name in STAGES:
        assert stage_text(StageEvent(time=1.0, stage=name)) == STAGES[name]
    assert stage_text(StageEvent(time=1.0, stage="loading", message="reading the data")) == "reading the data"
    took = "the longest micro-batch, 2 x 64 tokens, went through"
    assert stage_text(StageEvent(time=1.0, stage="rehearsing", message=took)) == took
    assert stage_text(StageEvent(time=1.0, stage="saving", message="the model")) == "saving: the model"
    assert stage_text(StageEvent(time=1.0, stage="dreaming")) == "dreaming"


def test_how_long_layers_are_compiled_is_told_where_it_is_forecast() -> None:
    knobs = {"compile": "regional"}
    plan = make_plan(make_request("llama-3.1-8b", gpu="rtx-4090", knobs=knobs), whole=False)
    told = plan.to_dict()["speed"]["first_step"]
    words = compiling_words(plan)
    assert words.startswith(f"about {told['seconds']:.0f} s (")
    assert f"{told['seconds_again']:.0f} if compiled here before" in words
    assert compiling_words(Plan.from_dict(plan.to_dict())) == words
    assert "up to five minutes" in compiling_words(None)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (59.9, "59 s"), (130, "2 min 10 s"), (3900, "1 h 05 min"), (-1, "0 s")]
)
def test_elapsed_time_is_short(value: float, text: str) -> None:
    assert seconds(value) == text


NOW = 1.8e9


@pytest.fixture
def _still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands."""
    monkeypatch.setattr("launcher.commands.follow.time.time", lambda: NOW)


@pytest.mark.usefixtures("_still")
def test_without_a_terminal_each_stage_before_the_first_step_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = NOW
    with _Line() as line:
        line.show(StageEvent(time=now, stage="loading", message="reading the data"))
        line.show(StageEvent(time=now + 95, stage="compiling", message=""))
        line.show(StageEvent(time=now + 300, stage="training", message=""))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "after 0 s: reading the data"
    assert said[1].startswith("after 1 min 35 s: compiling the layers")
    assert len(said) == 2


def drawn(line: _Line) -> str:
    """The live line as it is drawn at the moment."""
    console = Console(width=160, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(line._progress.get_renderable())
    return capture.get()


@pytest.mark.usefixtures("_still")
def test_in_a_terminal_the_seconds_run_from_the_first_one_on() -> None:
    line = _Line()
    first = drawn(line)
    line.show(StageEvent(time=NOW - 130, stage="compiling"))
    later = drawn(line)
    assert "starting Python" in first
    assert "0 s" in first
    assert "compiling the layers" in later
    assert "2 min 10 s" in later
