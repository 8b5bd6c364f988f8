"""Records for others: nothing of a person in them, and what cannot be so is found."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.base.data_files import PROFILES
from planner.calibration.exchange import exported, is_public, public_form
from planner.calibration.plausible import check_record, faults_of
from planner.calibration.records import Predicted, RunRecord, all_records, append_record, read_records
from planner.calibration.samples import samples_of
from planner.gpus.target import resolve_gpu
from planner.models.catalog import load_shipped, resolve_model
from planner.schemas import schema

Cli = Callable[..., Any]
PRIVATE = ("alice", "secret", "/somewhere", "laptop")


def measured() -> RunRecord:
    """A shipped record of a run with full rows on one GPU."""
    return next(read_records(PROFILES / "runs" / "adapters-h200.jsonl"))


def personal(**setup: Any) -> RunRecord:
    """The same as it may lie on somebody's machine: whatever is text has something private in it."""
    record = measured()
    here = dataclasses.replace(
        record.environment,
        driver="CUDA 13.0 of alice's laptop",
        python="3.12.3+secret",
        versions=(
            ("torch", "2.11.0+cu130"),
            ("trl", "1.17.0.dev0+secret"),
            ("peft", "/somewhere/alice/peft"),
            ("secret-package", "1.0"),
        ),
    )
    predicted = Predicted(
        allocated_bytes=1, reserved_bytes=1, process_bytes=1, process_upper_bytes=1, coefficients="alice-4090"
    )
    wanted = record.setup.replace(**{"model": "Qwen/Qwen3-30B-A3B", **setup})
    return dataclasses.replace(
        record, id="secret-run-of-alice", setup=wanted, environment=here, predicted=predicted
    )


def test_what_is_exported_has_nothing_of_a_person_and_is_checked(cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "user-data" / "runs"
    append_record(own / "train.jsonl", personal())
    append_record(own / "train.jsonl", dataclasses.replace(personal(), id="the-same-again"))
    append_record(own / "train.jsonl", dataclasses.replace(personal(), id="data", lengths=((77, 3),)))
    append_record(own / "calibrate.jsonl", personal(model="/somewhere/alice/secret-model"))
    append_record(own / "calibrate.jsonl", personal(target_modules=("/somewhere/alice",)))
    out = tmp_path / "out.jsonl"
    done = cli("records", "export", "-o", out)
    assert done.code == 0
    assert [
        reason in done.err for reason in ("not in the catalog", "lengths of its data", "plain names")
    ] == [True] * 3
    text = out.read_text()
    for private in (*PRIVATE, getpass.getuser() + "@", platform.node(), str(Path.home()) + "/"):
        assert private not in text
    (record,) = read_records(out)
    assert record.setup.model == "qwen3-30b-a3b"
    assert (record.environment.driver, record.environment.python) == ("CUDA 13.0", "3.12.3")
    assert record.environment.versions == (
        ("torch", "2.11.0+cu130"),
        ("trl", "1.17.0.dev0"),
        ("peft", "unknown"),
    )
    assert record.phases == measured().phases
    assert is_public(record)
    assert public_form(dataclasses.replace(record, id="unnamed")) == record
    checked = cli("records", "check", out)
    assert checked.code == 0, checked.out
    assert "plausible; qwen3-30b-a3b on h200" in checked.out
    assert "1 records, 0 of which cannot be so; 1 are of the kind that is fitted to." in checked.out
    figures = {
        one["figure"]: one
        for one in json.loads(cli("records", "check", out, "--json").out)["records"][0]["figures"]
    }
    assert abs(figures["allocated"]["expected"] / figures["allocated"]["measured"] - 1) < 0.001
    assert cli("records", "export").out == text


def test_an_exported_record_is_fitted_to_as_the_original_is() -> None:
    record, h200 = measured(), resolve_gpu("h200").spec
    (before,) = samples_of([record], h200, load_shipped)
    (after,) = samples_of(exported([record]).records, h200, resolve_model)
    assert dataclasses.replace(after, record=record) == dataclasses.replace(before, run=after.run)


def test_every_shipped_record_can_be_so() -> None:
    records = [record for record in all_records() if record.outcome == "ok"]
    assert len(records) > 400
    assert {record.id: faults for record in records if (faults := faults_of(record))} == {}


def with_step(**changes: int) -> RunRecord:
    record = measured()
    return dataclasses.replace(
        record,
        phases=tuple(dataclasses.replace(p, **changes) if p.name == "step" else p for p in record.phases),
    )


def with_environment(**changes: Any) -> RunRecord:
    record = measured()
    return dataclasses.replace(record, environment=dataclasses.replace(record.environment, **changes))


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (with_step(allocated_bytes=2**37), "step: more allocated than reserved"),
        (with_step(process_bytes=2**38), "step: more than the card has"),
        (with_step(allocated_bytes=1), "step: less allocated than the weights"),
        (dataclasses.replace(measured(), tokens_per_second=9e4), "tokens_per_second 90,000: its steps of"),
        (dataclasses.replace(measured(), step_seconds=(1.0, 0.0)), "a step took no time"),
        (
            dataclasses.replace(measured(), model_parameter_count=7),
            "model_parameter_count 7: qwen3-30b-a3b has",
        ),
        (dataclasses.replace(measured(), phases=()), "no step was measured"),
        (with_environment(gpu_id="rtx-4090"), "gpu_id rtx-4090: NVIDIA H200 is h200"),
        (with_environment(compute_capability=(8, 6)), "compute_capability 8.6: h200 has 9.0"),
        (with_environment(total_bytes=2**34), "with 17,179,869,184 bytes is not that card"),
        (personal(model="no-such-model"), "not in the catalog"),
    ],
    ids=lambda value: value[:25].replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_cannot_be_so_is_named(cli: Cli, tmp_path: Path, record: RunRecord, fault: str) -> None:
    assert any(fault in one for one in faults_of(record))
    found = check_record(record)
    assert found.figures == ()
    assert any("records export" in look for look in found.looks)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record.to_dict()))
    done = cli("records", "check", path)
    assert done.code == 1
    assert "cannot be so" in done.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("records", "export"), "there is no record to export"),
        (("records", "export", "x.jsonl"), "takes no FILE"),
        (("records", "check"), "takes a FILE"),
        (("records", "check", "no-such-file.jsonl"), "no-such-file.jsonl"),
        (("records", "check", "{}/bad.json"), "not a run record"),
        (("records", "check", "{}/empty.jsonl"), "there is no record in it"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("")
    done = cli(*(one.format(tmp_path) for one in arguments))
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert done.err.count("\n") == 1


def test_exported_records_are_as_the_published_schema_says() -> None:
    from jsonschema import Draft202012Validator

    values = json.loads(json.dumps(public_form(personal()).to_dict()))
    assert list(Draft202012Validator(schema("record", closed=True)).iter_errors(values)) == []
