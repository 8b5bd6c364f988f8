"""What commands print as JSON is what the published schemas say, no key more and none less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from planner.answers.plan import Plan
from planner.base.json_codec import encode
from planner.calibration.records import all_records
from planner.commands.schema import NAMES
from planner.planning.comparison import LongestLength
from planner.planning.make_plan import make_plan
from planner.schemas import OUTPUTS, schema
from planner.setup.request import make_request

ROOT = Path(__file__).resolve().parents[2]
DEMO = "profiles/demo/data/train.jsonl"
Cli = Callable[..., Any]


def validator(name: str) -> Draft202012Validator:
    """Of the schema as published, but that keys that it does not list are faults."""
    made = schema(name, closed=True)
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


def faults(name: str, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator(name).iter_errors(value)]


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("plan", ("plan", "qwen2.5-0.5b", "12GB", "--json", "--method", "qlora", "--data", DEMO), 0),
        ("plan", ("plan", "llama-3.1-70b", "24GB", "--json"), 3),
        ("compare", ("compare", "--model", "qwen2.5-0.5b", "--gpu", "12GB", "--json"), 0),
        ("compare", ("compare", "--model", "llama-3.2-1b", "--method", "qlora", "--json"), 0),
        ("check", ("check", "Qwen2.5-14B 4k QLoRA: 11.8 GB, 2,600 tok/s on a 5060 Ti", "--json"), 3),
        ("check", ("check", "llama-3.1-8b LoRA: 60 GB", "--json"), 0),
        ("estimate", ("estimate", "--config", "{}/axolotl.yml", "--gpu", "12GB", "--json"), 3),
    ],
)
def test_outputs_are_as_published(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: tuple[str, ...],
    code: int,
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "axolotl.yml").write_text(
        "base_model: meta-llama/Llama-3.1-8B\nadapter: lora\nlora_r: 16\nlora_target_linear: true\n"
        "sequence_len: 8192\nmicro_batch_size: 4\n"
    )
    done = cli(*(one.format(tmp_path) if "{" in one else one for one in arguments))
    assert done.code == code, done.err
    value = json.loads(done.out)
    assert value["version"] == OUTPUTS[name][1]
    assert faults(name, value) == []
    if name == "plan":
        assert Plan.from_dict(value).to_dict() == value
        return
    # What is not listed, and what is left out, would be seen.
    assert faults(name, {**value, "more": 1}) != []
    assert faults(name, {key: value[key] for key in value if key != "version"}) != []


def test_lines_of_estimate_are_as_published(cli: Cli, tmp_path: Path) -> None:
    lines = (ROOT / "tests" / "golden" / "setups.jsonl").read_text().splitlines()[::5]
    asked = tmp_path / "setups.jsonl"
    asked.write_text("\n".join([*lines, '{"model": "no-such-model", "max_length": 1}']) + "\n")
    done = cli("estimate", "--setups", asked, "--gpu", "24GB", "--json", "--no-replay")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [line for value in found for line in faults("estimate", value)] == []
    assert {"error", "line"} == set(found[-1])
    assert all(value["version"] == 1 for value in found[:-1])


def test_records_and_the_largest_models_are_as_published() -> None:
    records = [json.loads(json.dumps(record.to_dict())) for record in all_records()[::40]]
    assert len(records) > 10
    check = validator("record")
    assert [error.message for record in records for error in check.iter_errors(record)] == []
    model = LongestLength(
        model="m", parameter_count=1, max_length=1, peak_upper_bytes=1, reaches_model_limit=False
    )
    assert faults("compare", {"version": 1, "models": [encode(model)]}) == []


def test_a_plan_for_several_gpus_is_as_published() -> None:
    plan = make_plan(make_request("llama-3.2-1b", gpu="2x24GB"), whole=False, longest=True)
    assert plan.ways
    assert plan.longest is not None
    assert faults("plan", json.loads(json.dumps(plan.to_dict()))) == []


def test_schemas_are_printed_as_published(cli: Cli) -> None:
    assert set(NAMES) == set(OUTPUTS)
    for name in NAMES:
        printed = cli("schema", name).out
        assert printed == (ROOT / "docs" / "schema" / f"{name}.json").read_text(encoding="utf-8")
        assert json.loads(printed)["$id"] == f"urn:vramwise:{name}:{OUTPUTS[name][1]}"
