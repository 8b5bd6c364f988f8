"""`vramwise accuracy`: held-out errors from the committed records."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence

import pytest

from launcher.cli import run
from planner.calibration import accuracy as accuracy_module
from planner.calibration.accuracy import (
    Accuracy,
    SpeedAccuracy,
    accuracy,
    shipped_records,
    speed_accuracy,
)
from planner.calibration.memory_fit import Residual, held_out_residuals
from planner.calibration.records import RunRecord
from planner.calibration.samples import Resolve
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _fitted_once() -> Iterator[None]:
    """Each fit to all records takes seconds: every test is given the same."""
    errors: dict[object, tuple[Residual, ...]] = {}
    speeds: dict[object, tuple[SpeedAccuracy, ...]] = {}

    def errors_once(
        records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve, *, allocator: str
    ) -> tuple[Residual, ...]:
        key = (tuple(record.id for record in records), gpu.id, allocator)
        if key not in errors:
            errors[key] = held_out_residuals(records, gpu, resolve, allocator=allocator)
        return errors[key]

    def speed_once(records: Sequence[RunRecord]) -> tuple[SpeedAccuracy, ...]:
        key = tuple(record.id for record in records)
        if key not in speeds:
            speeds[key] = speed_accuracy(records)
        return speeds[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy_module, "held_out_residuals", errors_once)
        patch.setattr(accuracy_module, "speed_accuracy", speed_once)
        yield


@pytest.fixture(scope="module")
def found(_fitted_once: None) -> tuple[Accuracy, ...]:
    return accuracy(shipped_records())


@pytest.fixture(scope="module")
def speed(_fitted_once: None) -> tuple[SpeedAccuracy, ...]:
    return accuracy_module.speed_accuracy(shipped_records())


def test_each_model_is_judged_by_a_fit_without_it(found: tuple[Accuracy, ...]) -> None:
    for one in found:
        assert sum(model.runs for model in one.models) == one.overall[0].runs
        assert len({model.model for model in one.models}) == len(one.models)
    assert len(found[0].models) >= 30
    # By GPU, what the launcher sets first.
    assert [(one.gpu, one.allocator) for one in found[:2]] == [
        ("h100-80gb", EXPANDABLE),
        ("h100-80gb", NATIVE),
    ]


BARS = {
    EXPANDABLE: ((0.0001, 0.001, 0.03), (0.0005, 0.01, 0.06), (0.001, 0.01, 0.02)),
    NATIVE: ((0.001, 0.005, 0.03), (0.005, 0.04, 0.08), (0.01, 0.04, 0.05)),
}
"""Median, 95th percentile and worst of allocated, reserved and process."""


@pytest.mark.parametrize(("allocator", "runs", "driver"), [(EXPANDABLE, 270, 100), (NATIVE, 150, 20)])
def test_memory_is_as_right_as_the_readme_says(
    allocator: str, runs: int, driver: int, found: tuple[Accuracy, ...]
) -> None:
    """Each model held out."""
    one = next(one for one in found if (one.gpu, one.allocator) == ("h100-80gb", allocator))
    for summary, (median, high, worst) in zip(one.overall, BARS[allocator], strict=True):
        assert summary.median < median, summary
        assert summary.percentile_95 < high, summary
        assert abs(summary.worst) < worst, summary
    allocated, reserved, process = one.overall
    assert allocated.runs == reserved.runs >= runs
    assert process.runs >= driver


OUTSIDE = "20261201-9a9cffed1a62"
"""gemma-3-1b in full: one more gradient of its embedding was reserved than the replay of its own requests
does (docs/memory-model.md); the sixth run of a process, not yet measured alone."""


def test_no_run_as_launched_shows_much_more_than_was_said(found: tuple[Accuracy, ...]) -> None:
    """At most 2% above what was said without its model by the driver's figure and by the reserve."""
    for gpu_id in {one.gpu for one in found if one.allocator == EXPANDABLE}:
        gpu = gpu_catalog().get(gpu_id)
        for one in accuracy_module.held_out_residuals(
            shipped_records(), gpu, load_shipped, allocator=EXPANDABLE
        ):
            least = -0.065 if one.record_id == OUTSIDE else -0.02
            assert one.reserved_error > least, one
            assert one.process_error is None or one.process_error > least, one


def test_a_persons_own_training_runs_are_not_counted() -> None:
    """Of the H200's records, which are soonest fitted."""
    records = [record for record in shipped_records() if record.environment.gpu_id == "h200"]
    counted = accuracy(records)[0].overall[0].runs
    assert counted >= 20
    ran = next(record for record in records if record.allocator == EXPANDABLE)
    own = dataclasses.replace(ran, id="own", source="train")
    assert accuracy((*records, own))[0].overall[0].runs == counted


def test_json_holds_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accuracy", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [one["figure"] for one in values["gpus"][0]["overall"]] == ["allocated", "reserved", "process"]
    assert [one["allocator"] for one in values["gpus"][:2]] == [EXPANDABLE, NATIVE]

    speed = next(one for one in values["speed"] if one["gpu"] == "h100-80gb")
    assert speed["held_out"].keys() == {"runs", "bias", "median", "percentile_90", "worst"}
    assert sum(model["summary"]["runs"] for model in speed["models"]) == speed["held_out"]["runs"]
    assert [one["card_class"] for one in values["published"]][:3] == ["Turing", "Ampere", "Ada"]
    assert all(one["summary"].keys() == speed["held_out"].keys() for one in values["published"])


def test_speed_is_as_right_as_the_documentation_says(speed: tuple[SpeedAccuracy, ...]) -> None:
    reference, *others = sorted(speed, key=lambda one: one.gpu != "h100-80gb")
    assert reference.held_out is not None
    assert reference.held_out.runs >= 140
    assert reference.held_out.median < 0.04
    assert reference.held_out.percentile_90 < 0.12
    assert reference.gpu_bound is not None
    assert reference.host_bound is not None
    assert reference.earlier is not None
    assert reference.gpu_bound.runs + reference.host_bound.runs == reference.held_out.runs
    assert reference.gpu_bound.median < 0.03
    assert reference.gpu_bound.percentile_90 < 0.10
    # Hosts differ from run to run.
    assert reference.host_bound.percentile_90 < 0.21
    assert abs(reference.held_out.bias) < 0.03
    # Their trainer waited more often.
    assert reference.earlier.runs > 300
    assert reference.earlier.bias > reference.held_out.bias
    # Rates fitted elsewhere have not seen any run here; the reference borrows from nobody.
    assert reference.borrowed is None
    for one in others:
        assert one.borrowed is not None
        assert one.borrowed.runs >= 20
        # Eleven of the H200's 47 are of mixtures, six of full fine-tuning with an 8-bit optimizer, of which
        # the H100's runs tell next to nothing (docs/throughput.md).
        assert one.borrowed.median < 0.07
        assert one.borrowed.percentile_90 < 0.17


def test_a_gpu_with_few_runs_is_judged_by_borrowed_rates() -> None:
    first, *_ = shipped_records()
    there = dataclasses.replace(first.environment, gpu_id="h200")
    found = speed_accuracy([dataclasses.replace(first, environment=there)])[0]
    assert found.held_out is None
    assert found.borrowed is not None
    assert found.borrowed.runs == 1


def test_each_table_says_in_words_which_allocator_its_runs_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["accuracy"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.match(
        r"h100-80gb, expandable segments, as the launcher starts runs \d{3} runs of \d{2} models", text
    )
    default = "torch's default allocator: Windows and WSL, where expandable segments do not work"
    assert f"h100-80gb, {default}" in text


@pytest.mark.parametrize("width", [40, 80])
def test_no_number_is_cut(
    width: int,
    found: tuple[Accuracy, ...],
    speed: tuple[SpeedAccuracy, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(["accuracy"]) == 0
    text = capsys.readouterr().out
    worst = next(one for one in found if one.gpu == "h100-80gb").overall[1].worst
    assert worst is not None
    assert f"{100 * worst:+.2f}" in text
    reference = next(one for one in speed if one.gpu == "h100-80gb")
    assert reference.held_out is not None
    assert f"{100 * reference.held_out.percentile_90:.1f}" in text
    lines = text.splitlines()
    models = max(at for at, line in enumerate(lines) if line.startswith("model "))
    assert all(line.rstrip() for line in lines[models : models + len(speed[-1].models) + 1])


def test_models_table_never_cuts_a_length(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["models", "llama-3.1-8b"]) == 0
    assert "131,072" in capsys.readouterr().out
