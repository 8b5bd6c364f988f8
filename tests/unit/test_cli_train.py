"""`vramwise train` on the demo: plan, run, compare; and Ctrl-C."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.train import _for_the_cpu
from launcher.models import inspect
from launcher.models.inspect import inspect_in_child
from launcher.runs.events import EndEvent, LogEvent, read_events
from launcher.runs.folder import RunFolder
from planner.answers.plan import Plan
from planner.base.data_files import PROFILES
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from tests import describing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Cli = Callable[..., Any]
DEMO = (
    *("--model", str(PROFILES / "demo" / "model")),
    *("--data", str(PROFILES / "demo" / "data" / "train.jsonl")),
    # Processors without units for bfloat16 take a hundred times as long for it.
    *("--dtype", "float32"),
)

# Steps of a tenth of a second.
SHORT = (*("--max-length", "64", "--per-device-train-batch-size", "2"), "--gradient-accumulation-steps", "1")
# Little is left to search for.
SETTLED = (
    *("--gpu", "16GB", "--max-length", "128", "--lora-r", "4", "--no-gradient-checkpointing"),
    *("--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1", "--optim", "adamw_8bit"),
    *("--compile", "none", "--attn-implementation", "sdpa"),
)


def start(tmp_path: Path, *extra: str) -> subprocess.Popen[str]:
    for module in ("torch", "trl", "bitsandbytes"):
        pytest.importorskip(module)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launcher.cli",
            "train",
            *DEMO,
            "--runs",
            str(tmp_path),
            "--name",
            "run",
            *extra,
        ],
        env={**os.environ, "VRAMWISE_DATA_DIR": str(tmp_path / "own"), "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@functools.cache
def described(config: str, model_id: str, hub_id: str) -> ModelSpec:
    with describing.here():
        return inspect_in_child(json.loads(config), model_id=model_id, hub_id=hub_id)


@pytest.fixture(autouse=True)
def _described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: a child that describes the demo imports torch for it."""

    def once(config: Mapping[str, Any], *, model_id: str, hub_id: str) -> ModelSpec:
        return described(json.dumps(config), model_id, hub_id)

    monkeypatch.setattr(inspect, "inspect_in_child", once)


def test_the_planned_run_is_what_runs(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    asked = ("--max-steps", "4", "--gpu", "16GB", "--lora-r", "4", "--runs", tmp_path, "--name", "run")
    finished = cli("train", *DEMO, *SHORT, *asked)
    out = finished.out
    assert finished.code == 0, finished.err
    assert "Traceback" not in finished.err
    assert out.startswith("FITS")
    assert out.index("Finished after 4 steps") < out.index("Predicted beside measured")
    folder = RunFolder(tmp_path / "run")
    plan = Plan.from_dict(json.loads(folder.plan.read_text()))
    assert folder.read_job().setup == plan.setup
    assert plan.setup.lora_r == 4
    assert plan.data is not None
    assert not plan.data.estimated
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["r"] == 4
    assert sum(isinstance(event, LogEvent) for event in read_events(folder.events)) == 4


def test_ctrl_c_stops_after_the_step_and_saves(tmp_path: Path) -> None:
    child = start(tmp_path, *SHORT, "--epochs", "500")
    assert child.stderr is not None
    for line in child.stderr:
        if "loss" in line:
            break
    child.send_signal(signal.SIGINT)
    _, talk = child.communicate(timeout=600)
    assert child.returncode == 130
    assert "Traceback" not in talk
    folder = RunFolder(tmp_path / "run")
    end = read_events(folder.events)[-1]
    assert isinstance(end, EndEvent)
    assert end.state == "stopped"
    assert (folder.adapter / "adapter_model.safetensors").is_file()


def test_a_plan_that_does_not_fit_starts_nothing(cli: Cli, tmp_path: Path) -> None:
    too_large = ("--per-device-train-batch-size", "8192", "--max-length", "4096")
    finished = cli("train", *DEMO, "--runs", tmp_path, "--name", "run", "--gpu", "6GB", *too_large)
    assert finished.code == 3, finished.err
    assert finished.out.startswith("DOES NOT FIT")
    assert not (tmp_path / "run").exists()


def test_a_plan_for_the_cpu_chooses_nothing_that_the_launcher_refuses_there() -> None:
    build = pytest.importorskip("launcher.training.build", exc_type=ImportError)
    model = resolve_model("qwen2.5-14b")
    length = {"max_length": 2048}
    assert make_plan(
        make_request(model.id, gpu="12GB", knobs=length), whole=False
    ).setup.activation_offloading
    plan = make_plan(make_request(model.id, gpu="12GB", knobs={**length, **_for_the_cpu(model)}), whole=False)
    build.refuse_unsupported(plan.setup, on_gpu=False)


def test_a_dry_run_says_what_would_be_started_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    runs = tmp_path / "runs"
    asked = ("train", *DEMO, *SETTLED, "--runs", runs, "--name", "night", "--dry-run")
    finished = cli(*asked, "--eval-split", "0.1", "--early-stopping-patience", "3", "--epochs", "2")
    assert finished.code == 0, finished.err
    out = " ".join(finished.out.split())
    assert "nothing is started and nothing is written" in out
    assert str(runs / "night") in out.replace(" ", "")
    assert "0.1 of the data, which is not trained, after each epoch" in out
    assert "has not fallen 3 times in a row" in out
    assert "GiB free there" in out
    # 288 of the 320 examples, 8 a step.
    assert "steps 72 " in out
    assert not runs.exists()
    for wrong in (("--eval-split", "1.5"), ("--eval-steps", "5"), ("--early-stopping-patience", "2")):
        refused = cli(*asked, *wrong)
        assert (refused.code, runs.exists()) == (2, False)
        assert wrong[0] in refused.err
    (runs / "night").mkdir(parents=True)
    assert "exists already" in cli(*asked).err


def test_a_saved_plan_is_what_would_be_started(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "plan.json"
    saved = cli("plan", *DEMO, *SETTLED, "-o", path)
    assert saved.code == 0, saved.err
    finished = cli("train", "--plan", path, "--runs", tmp_path / "runs", "--dry-run")
    assert finished.code == 0, finished.err
    assert "rank 4" in finished.out
    assert "estimated anew" in finished.err  # the lengths were estimated, and are counted here
    refused = cli("train", "--plan", path, "--lora-r", "8", "--runs", tmp_path / "runs", "--dry-run")
    assert refused.code == 2
    assert "--lora-r 8 contradicts" in refused.err
