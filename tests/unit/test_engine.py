"""Who trains: Unsloth is planned by what was measured of it, taken where it is first done, else refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.training.engines.asked import plan_for_engine, taken
from planner.base.data_files import PROFILES
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import resolve_model
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL, UNSLOTH
from planner.setup.training_setup import TrainingSetup
from planner.throughput.roofline import estimate_step

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
RIVALS = ROOT / "benchmarks" / "results" / "rivals.json"
DEMO = ("--model", PROFILES / "demo" / "model", "--data", PROFILES / "demo" / "data" / "train.jsonl")


def test_its_speed_is_what_it_was_measured_at() -> None:
    card, model = gpu_catalog().get("h100-80gb"), resolve_model("llama-3.1-8b")
    runs = [run for run in json.loads(RIVALS.read_text())["measured"] if run["contender"] == "unsloth"]
    runs = [run for run in runs if run["outcome"] == "ok"]
    assert {run["per_device_train_batch_size"] for run in runs} == {8, 16}
    for run in runs:
        setup = TrainingSetup(
            model=model.id,
            max_length=2048,
            method="qlora",
            per_device_train_batch_size=run["per_device_train_batch_size"],
            gradient_accumulation_steps=run["gradient_accumulation_steps"],
            activation_offloading=True,
            optim=run["optim"],
        )
        own, other = (
            estimate_step(TrainingRun(setup=setup, model=model, stack=s), card) for s in (TRL, UNSLOTH)
        )
        assert other.tokens_per_second == pytest.approx(run["tokens_per_second"], rel=0.02)
        # What is not known of other cards and models: that it is faster at all.
        assert other.tokens_per_second_low == pytest.approx(own.tokens_per_second_low, rel=0.01)
        assert "not known of other cards" in other.basis


@pytest.mark.parametrize(("knobs", "better"), [({}, False), ({"compile": "none"}, True)], ids=str)
def test_it_is_taken_by_itself_where_it_is_done_first(
    knobs: dict[str, Any], better: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = resolve_model("llama-3.1-8b")
    if better:
        knobs = {**knobs, "gradient_checkpointing": True, "kernels": "none"}
    request = make_request(model.id, gpu="h100", knobs={**knobs, "max_length": 2048, "method": "qlora"})
    own = make_plan(request, model=model, whole=False)
    other = plan_for_engine(request, model=model, stats=None, on_gpu=True)
    assert taken(own, other) is better
    said = capsys.readouterr().err
    assert (
        "Unsloth is taken (--engine trl for" if better else "the latter is taken (--engine unsloth"
    ) in said


def test_what_it_needs_is_said_in_a_line(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("trl")

    def refused(*more: object) -> str:
        done = cli("train", *DEMO, "--engine", "unsloth", "--runs", tmp_path / "runs", *more)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert not (tmp_path / "runs").exists()
        return str(done.err)

    assert "needs --unsloth-python: the Python of an environment made with: uv venv" in refused()
    assert "nowhere cannot be run (No such file or directory)" in refused("--unsloth-python", "/nowhere")
    assert "unsloth, unsloth_zoo is not installed for" in refused("--unsloth-python", sys.executable)
    own = ("--unsloth-python", sys.executable)
    assert "cannot do --eval-split: leave it out" in refused(*own, "--eval-split", "0.1")
    cli("config", "set", "unsloth_python", "/no/such/python")
    assert "/no/such/python cannot be run" in refused()
