"""The report of a run: the same facts as page, JSON and picture, whatever the run ended as."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from launcher.runs.ends import END_STATES
from launcher.runs.events import (
    AdapterEvent,
    AttemptEvent,
    EndEvent,
    EvalEvent,
    Event,
    LogEvent,
    StartEvent,
    WarningEvent,
    to_line,
)
from launcher.runs.folder import RunFolder
from launcher.runs.report.facts import next_steps, run_report
from launcher.runs.report.picture import loss_curve
from launcher.runs.report.writing import write_report

from .test_run_record import ON_GPU, run_with

pytest.importorskip("psutil")
Cli = Callable[..., Any]
SVG = "{http://www.w3.org/2000/svg}"


def log(step: int, loss: float | None, time: float | None = None) -> LogEvent:
    return LogEvent(
        time=1.8e9 + step if time is None else time,
        step=step,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens_per_second=100.0,
        step_seconds=1.0,
        num_tokens=step * 100,
    )


def evaluation(step: int, loss: float) -> EvalEvent:
    return EvalEvent(time=1.8e9 + step, step=step, loss=loss)


def add(folder: RunFolder, *events: Event) -> None:
    with folder.events.open("a") as file:
        file.writelines(map(to_line, events))


def without_end(folder: RunFolder) -> None:
    lines = folder.events.read_text().splitlines(keepends=True)
    folder.events.write_text("".join(line for line in lines if '"kind": "end"' not in line))


def test_json_page_and_picture_tell_the_same(tmp_path: Path) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    without_end(folder)
    for step in (1, 2, 4):
        (folder.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    folder.adapter.mkdir()
    add(
        folder,
        *(evaluation(step, loss) for step, loss in ((1, 2.9), (2, 2.25), (4, 2.6))),
        AdapterEvent(time=1.8e9 + 5, step=2, path=str(folder.adapter), evaluation_loss=2.25),
        EndEvent(time=1.8e9 + 9, state="finished", message="", step=4),
    )
    write_report(folder)
    values, page = json.loads(folder.report.read_text()), folder.report_page.read_text()
    assert (values["state"], values["steps"], values["seconds"]) == ("finished", 4, 9.0)
    assert (values["first_loss"], values["last_loss"]) == (2.9, 2.6)
    assert values["best_evaluation"] == {"step": 2, "loss": 2.25}
    assert [one["step"] for one in values["checkpoints"]] == [1, 2, 4]
    step = next(one for one in values["memory"] if (one["phase"], one["what"]) == ("step", "driver"))
    assert step["measured_bytes"] == 6 * 2**30
    assert f"| step | driver | {step['predicted_bytes'] / 2**30:.2f} | 6.00 |" in page
    assert "2.25 at step 2, the best of 3" in page
    assert "of step 2: the best evaluation" in page
    assert "of step 1, 2, 4" in page
    for line in ("vramwise merge", "vllm serve", "--max-lora-rank 16"):
        assert line in page
    picture = ET.fromstring(folder.loss_curve.read_text())
    assert len(picture.findall(f"{SVG}circle")) == 3
    (line,) = picture.findall(f"{SVG}polyline")
    assert len(line.attrib["points"].split()) == 4
    assert folder.loss_curve.name in page


@pytest.mark.parametrize(
    ("config", "setup", "said"),
    [
        ({}, {"lora_r": 4}, "--max-lora-rank 8"),
        ({"target_parameters": ["experts.gate_up_proj"]}, {}, None),
        ({}, {"use_dora": True}, None),
        ({}, {"lora_r": 1024}, None),
    ],
    ids=["rank-rounded-up", "experts", "dora", "rank-too-large"],
)
def test_vllm_is_suggested_for_what_it_serves_alone(
    tmp_path: Path, config: dict[str, Any], setup: dict[str, Any], said: str | None
) -> None:
    """`merge` knows what vLLM refuses; a report suggests none of that."""
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text(json.dumps(config))
    job = folder.read_job()
    job = dataclasses.replace(job, setup=job.setup.replace(**setup))
    lines = [step.command for step in next_steps(folder, job, "finished")]
    assert any(line.startswith("vramwise merge") for line in lines)
    served = [line for line in lines if line.startswith("vllm")]
    assert [said in line for line in served] == [True] if said else served == []


@pytest.mark.parametrize("state", END_STATES)
def test_every_end_has_a_report_with_its_reason(tmp_path: Path, state: str) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    without_end(folder)
    add(folder, EndEvent(time=1.8e9 + 9, state=state, message="because of the weather", step=4))
    report = write_report(folder)
    assert report.state == state
    page = folder.report_page.read_text()
    assert "because of the weather" in page
    assert page.startswith(f"# run: {state}\n")


def test_a_killed_run_that_is_followed_has_a_report(cli: Cli, tmp_path: Path) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    without_end(folder)
    (folder.checkpoints / "checkpoint-3").mkdir(parents=True)
    folder.lock_file("trainer").touch()
    finished = cli("runs", "follow", "run", "--runs", tmp_path)
    assert "Killed after 4 steps" in finished.out
    assert str(folder.report_page) in finished.out.replace("\n", "").replace(" ", "")
    assert json.loads(folder.report.read_text())["state"] == "killed"
    assert "vramwise runs resume run" in folder.report_page.read_text()


def test_steps_that_an_attempt_did_again_count_once(tmp_path: Path) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    folder.events.write_text("")
    start = StartEvent(time=1000.0, total_steps=6, environment={})

    def attempt(number: int, reason: str, step: int, time: float) -> AttemptEvent:
        return AttemptEvent(time=time, number=number, reason=reason, from_step=step, changes="half the batch")

    add(folder, attempt(1, "start", 0, 1000.0), start)
    add(folder, *(log(step, 5.0 - step, 1000.0 + step) for step in (1, 2, 3, 4)))
    add(
        folder,
        EvalEvent(time=1004.0, step=4, loss=0.5),
        EndEvent(time=1005.0, state="oom", message="", step=4),
    )
    add(folder, attempt(2, "oom", 2, 2000.0), *(log(step, 9.0 - step, 2000.0 + step) for step in (3, 4, 5)))
    report, history = run_report(folder)
    assert [point[0] for point in history.losses.points()] == [1, 2, 3, 4, 5]
    assert (report.first_loss, report.last_loss, report.lowest_loss) == (4.0, 4.0, 3.0)
    assert report.best_evaluation is None
    assert report.seconds == 5.0 + 5.0
    assert [(one.reason, one.from_step, one.end_state) for one in report.attempts] == [
        ("start", 0, "oom"),
        ("oom", 2, None),
    ]


def test_what_came_from_outside_is_escaped(tmp_path: Path) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    evil = "</td><script>alert(1)</script> | x | [a](http://b) `c` \x1b[2J\n# not a heading"
    add(folder, WarningEvent(time=1.8e9, message=evil))
    write_report(folder)
    page = folder.report_page.read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "[a](http" not in page
    assert "\n# not" not in page
    assert "\\# not a heading" in page
    ET.fromstring(loss_curve([(1, 2.0)], [], title=evil.replace("\x1b", "")))


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1e-9), (10**9, 1e9)]])
def test_any_losses_make_a_picture(points: list[tuple[float, float]]) -> None:
    picture = ET.fromstring(loss_curve(points, points, title="x"))
    assert len(picture.findall(f"{SVG}circle")) == len(points) + (len(points) == 1)
    assert "nan" not in ET.tostring(picture, encoding="unicode")


def test_a_run_with_damaged_plan_or_no_events_still_has_a_report(tmp_path: Path) -> None:
    folder = run_with(tmp_path, ON_GPU, on_gpu=True)
    folder.plan.write_text("{")
    folder.events.unlink()
    report = write_report(folder)
    assert report.memory == ()
    assert report.steps == 0
    assert "no loss was logged" in folder.loss_curve.read_text()
