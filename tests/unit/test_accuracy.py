"""`vramwise accuracy`: held-out errors from the committed records."""

from __future__ import annotations

import dataclasses
import json

import pytest

from launcher.cli import run
from planner.accuracy import accuracy, shipped_records, speed_accuracy


@pytest.fixture(scope="module")
def found() -> object:
    return accuracy(shipped_records())


def test_each_model_is_judged_by_a_fit_without_it(found: tuple) -> None:
    for one in found:
        assert sum(model.runs for model in one.models) == one.overall[0].runs
        assert len({model.model for model in one.models}) == len(one.models)
    assert len(found[0].models) >= 30


def test_memory_is_as_right_as_the_readme_says(found: tuple) -> None:
    """Each model held out: median, 95th percentile and worst of each figure."""
    allocated, reserved, process = next(one for one in found if one.gpu == "h100-80gb").overall
    bars = {allocated: (0.001, 0.005, 0.03), reserved: (0.01, 0.05, 0.08), process: (0.01, 0.05, 0.08)}
    for summary, (median, high, worst) in bars.items():
        assert summary.median < median, summary
        assert summary.percentile_95 < high, summary
        assert abs(summary.worst) < worst, summary
    assert allocated.runs == reserved.runs >= 150
    assert process.runs >= 60


def test_a_persons_own_training_runs_are_not_counted(found: tuple) -> None:
    counted = found[0].overall[0].runs
    assert counted >= 150
    own = dataclasses.replace(shipped_records()[0], id="own", source="train")
    assert accuracy((*shipped_records(), own))[0].overall[0].runs == counted


def test_json_holds_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accuracy", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [one["figure"] for one in values["gpus"][0]["overall"]] == ["allocated", "reserved", "process"]

    speed = next(one for one in values["speed"] if one["gpu"] == "h100-80gb")
    assert speed["held_out"].keys() == {"runs", "bias", "median", "percentile_90", "worst"}
    assert sum(model["summary"]["runs"] for model in speed["models"]) == speed["held_out"]["runs"]


def test_speed_is_as_right_as_the_documentation_says() -> None:
    reference, *others = sorted(speed_accuracy(shipped_records()), key=lambda one: one.gpu != "h100-80gb")
    assert reference.held_out is not None
    assert reference.held_out.runs >= 150
    assert reference.held_out.median < 0.05
    assert reference.held_out.percentile_90 < 0.16
    assert abs(reference.held_out.bias) < 0.03
    # Rates fitted elsewhere have not seen any run here; the reference borrows from nobody.
    assert reference.borrowed is None
    assert all(one.borrowed is not None for one in others)


def test_a_gpu_with_few_runs_is_judged_by_borrowed_rates() -> None:
    first, *_ = shipped_records()
    there = dataclasses.replace(first.environment, gpu_id="h200")
    found = speed_accuracy([dataclasses.replace(first, environment=there)])[0]
    assert found.held_out is None
    assert found.borrowed is not None
    assert found.borrowed.runs == 1


@pytest.mark.parametrize("width", [40, 80])
def test_no_number_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(["accuracy"]) == 0
    text = capsys.readouterr().out
    worst = next(one for one in accuracy(shipped_records()) if one.gpu == "h100-80gb").overall[1].worst
    assert worst is not None
    assert f"{100 * worst:+.2f}" in text
    speed = next(one for one in speed_accuracy(shipped_records()) if one.gpu == "h100-80gb")
    assert speed.held_out is not None
    assert f"{100 * speed.held_out.percentile_90:.1f}" in text
    last = speed_accuracy(shipped_records())[-1]
    assert all(line.rstrip() for line in text.splitlines()[-len(last.models) :])


def test_models_table_never_cuts_a_length(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["models", "llama-3.1-8b"]) == 0
    assert "131,072" in capsys.readouterr().out
