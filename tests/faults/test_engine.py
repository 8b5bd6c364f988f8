"""A run that another trainer does, in an environment of its own, by the script that is written for it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.events import AdapterEvent, EndEvent, LogEvent, MemoryEvent, StartEvent
from launcher.runs.folder import RunFolder
from launcher.runs.kept.resumption import ResumeWish, prepare
from planner.base.errors import InputError
from planner.trainers.files import read_values
from tests import forks
from tests.faults.small_runs import DEMO, SETUP, code_of, events_of, make_run
from tests.faults.stand_in_unsloth import make_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# What a plan for it writes: Unsloth has no other.
OTHERS = dataclasses.replace(SETUP, dtype="bfloat16")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("trl")
    return make_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    forks.kill_what_is_left()


def engine(run: Path) -> int:
    from launcher.training.engines.engine import main

    return main([str(run)])


def done(root: Path, python: Path, stand_in: str = "", **job: Any) -> tuple[RunFolder, int | None]:
    """A run that the engine does to its end, and its exit code."""
    run = make_run(root, setup=OTHERS, engine="unsloth", engine_python=str(python), checkpoints=False, **job)
    output = run.log("trainer")
    trainer = forks.start(engine, run.path, output=output, environment={**os.environ, "STAND_IN": stand_in})
    return run, code_of(trainer)


def test_it_trains_the_tokens_of_our_own_and_tells_as_our_own_does(tmp_path: Path, python: Path) -> None:
    run, code = done(tmp_path, python, max_steps=3, examples=6)
    assert code == 0, run.log("trainer").read_text()
    (start,), logs = events_of(run, StartEvent), events_of(run, LogEvent)
    assert (start.total_steps, [log.step for log in logs]) == (3, [1, 2, 3])
    assert (start.environment["unsloth"], start.environment["device"]) == ("2026.10.9", "cpu")
    assert {event.phase for event in events_of(run, MemoryEvent)} == {"load", "step"}
    # Six examples, two a step: each token of the data once.
    from launcher.training import build, dataset

    data = dataset.read_dataset(tmp_path / "6.jsonl")
    tokenizer = build.load_tokenizer(str(DEMO / "model"), allow_download=False)
    rows = dataset.to_trl_dataset(data, tokenizer, max_length=OTHERS.max_length)
    assert logs[-1].num_tokens == sum(map(len, rows["input_ids"]))
    assert json.loads((run.adapter / "adapter_config.json").read_text())["r"] == OTHERS.lora_r
    (adapter,), (end,) = events_of(run, AdapterEvent), events_of(run, EndEvent)
    assert (adapter.step, end.state) == (3, "finished")
    # The script stays, and is read as what it trains; what it worked with is gone.
    values = read_values(run.path / "unsloth_train.py")
    assert (values["max_steps"], values["seed"], values["max_length"]) == (3, 42, OTHERS.max_length)
    assert not list(run.path.glob(".engine*"))
    with pytest.raises(InputError, match="is finished"):
        prepare(run, ResumeWish())


@pytest.mark.parametrize(
    ("stand_in", "code", "state", "message"),
    [
        ("broken", 1, "failed", "Unsloth: ImportError: no kernel image for this card"),
        ("full", 4, "oom", "Unsloth: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_what_it_fails_by_is_told(
    tmp_path: Path, python: Path, stand_in: str, code: int, state: str, message: str
) -> None:
    run, ended = done(tmp_path, python, stand_in)
    (end,) = events_of(run, EndEvent)
    assert (ended, end.state, end.message) == (code, state, message)
    assert "Traceback" in run.log("trainer").read_text()
    assert not run.adapter.exists()
    with pytest.raises(InputError, match="unsloth saves no checkpoints"):
        prepare(run, ResumeWish())


def test_ctrl_c_ends_it_after_the_step_with_the_adapter(tmp_path: Path, python: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", "train", "--runs", str(tmp_path), "--name", "run"]
    command += ["--model", str(DEMO / "model"), "--data", str(DEMO / "data" / "train.jsonl")]
    command += ["--engine", "unsloth", "--unsloth-python", str(python), "--gpu", "16GB", "--epochs", "500"]
    command += [
        "--max-length",
        "64",
        "--per-device-train-batch-size",
        "2",
        "--gradient-accumulation-steps",
        "1",
    ]
    child = subprocess.Popen(
        command,
        env={**os.environ, "VRAMWISE_DATA_DIR": str(tmp_path / "own"), "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if "loss" in line:
            break
    child.send_signal(signal.SIGINT)
    out, talk = child.communicate(timeout=600)
    assert child.returncode == 130, "".join(said) + talk
    assert "Traceback" not in talk
    assert any("trained by Unsloth 2026.10.9" in line for line in said)
    run = RunFolder(tmp_path / "run")
    (end,) = events_of(run, EndEvent)
    assert end.state == "stopped"
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert "Predicted beside measured" in out
    assert json.loads(run.report.read_text())["state"] == "stopped"
    assert run.samples.stat().st_size > 0
