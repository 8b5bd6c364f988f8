"""The run's processes under faults: real processes on the demo model, on the CPU.

What the launcher starts is started by it once to its end, once to be stopped and once to be killed while it
loads; what the training process does by itself is seen in forks (tests/forks.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import supervisor
from launcher.runs.ends import RunExit
from launcher.runs.events import (
    EndEvent,
    EvalEvent,
    LogEvent,
    MemoryEvent,
    SampleEvent,
    StartEvent,
    read_events,
)
from launcher.runs.folder import RunBusyError, RunFolder, create_run_folder
from launcher.runs.heartbeat import STACKS_SIGNAL, read_beat
from launcher.runs.kept import checkpoints
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import PROFILES
from planner.setup.training_setup import TrainingSetup
from tests import forks
from tests.faults import broken_steps
from tests.faults.broken_steps import BROKEN_AFTER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = PROFILES / "demo"
ROOT = Path(__file__).resolve().parents[2]
LONG = 100_000
SMALL = TrainingSetup(
    model="demo", max_length=64, method="lora", dtype="float32", per_device_train_batch_size=2, lora_r=4
)
SECRETS = {"HF_TOKEN": "hf_canary_token_0123456789", "WANDB_API_KEY": "wandb_canary_0123456789"}


def make_run(root: Path, **changes: Any) -> RunFolder:
    # Processors without bfloat16 units take seventy times as long for it.
    setup = TrainingSetup(model="demo", max_length=128, per_device_train_batch_size=8, dtype="float32")
    values: dict[str, Any] = {
        "setup": setup,
        "model_source": str(DEMO / "model"),
        "data_path": str(DEMO / "data" / "train.jsonl"),
        "learning_rate": 4e-3,
        **changes,
    }
    return create_run_folder(root, TrainingJob(**values))


def wait_until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.1)


def steps_seen(run: RunFolder) -> int:
    return supervisor.status(run.path).step


def the_end(run: RunFolder) -> EndEvent:
    ends = [event for event in read_events(run.events) if isinstance(event, EndEvent)]
    assert len(ends) == 1
    return ends[0]


def start(run: RunFolder, break_step: Callable[[], None] | None = None) -> BaseProcess:
    """Start the training process as it is, or with a step that fails."""
    return forks.start(broken_steps.train, run.path, break_step, output=run.log("trainer"))


def exit_code(trainer: BaseProcess) -> int | None:
    trainer.join(600)
    return trainer.exitcode


@dataclass(frozen=True)
class Demo:
    """A run of the demo that was started and has ended."""

    run: RunFolder
    handle: supervisor.RunHandle
    status: supervisor.RunStatus


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Started beside a file named as a library, with secrets in the environment, and watched by a process
    that is killed.
    """
    folder = tmp_path_factory.mktemp("demo")
    (folder / "torch.py").write_text("raise SystemExit('shadowed')")
    run = make_run(
        folder, num_train_epochs=2.0, save_steps=40, eval_data_path=str(DEMO / "data" / "eval.jsonl")
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        handle = supervisor.start(run.path)
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from launcher.runs.events import follow\n"
            "for event in follow(Path(sys.argv[1])): print(event, flush=True)",
            str(run.events),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    with pytest.raises(RunBusyError):
        supervisor.start(run.path)
    wait_until(lambda: steps_seen(run) >= 1)
    watcher.kill()
    watcher.wait()
    return Demo(run, handle, handle.wait(600))


def test_the_demo_learns_and_its_adapter_changes_the_answer(demo: Demo) -> None:
    import torch
    from peft import PeftModel

    from launcher.training import build

    run, handle = demo.run, demo.handle
    assert demo.status.state == "finished"
    assert handle.keeper.wait(60) == RunExit.FINISHED
    with pytest.raises(RunBusyError, match="finished"):
        supervisor.start(run.path)

    events = read_events(run.events)
    logs = [event for event in events if isinstance(event, LogEvent)]
    losses = [event.loss or 0.0 for event in logs]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(event.tokens_per_second and event.step_seconds for event in logs)
    start = next(event for event in events if isinstance(event, StartEvent))
    assert start.total_steps == len(logs) == the_end(run).step == 80
    assert start.environment["trl"]
    assert {event.phase for event in events if isinstance(event, MemoryEvent)} >= {"load", "step", "save"}
    assert any(isinstance(event, EvalEvent) for event in events)
    samples = read_events(run.samples)
    assert samples
    assert all(isinstance(event, SampleEvent) and event.process_bytes for event in samples)

    names = {path.name for path in run.adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    tokenizer = build.load_tokenizer(str(run.adapter), allow_download=False)
    job = run.read_job()
    model = build.load_model(job.setup, job.model_source, device=torch.device("cpu"), allow_download=False)
    question = [{"role": "user", "content": "Hello, I am Ada."}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def answer(asked: Any) -> str:
        tokens = asked.generate(**inputs, max_new_tokens=30, do_sample=False)
        return str(tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :]))

    before = answer(model)
    after = answer(PeftModel.from_pretrained(model, str(run.adapter)))
    assert before != after
    assert after.startswith("Ahoy")


def test_a_run_that_nobody_followed_has_its_report(demo: Demo) -> None:
    """Written by the sampler, which outlives the trainer however that ends."""
    values = json.loads(demo.run.report.read_text())
    assert (values["state"], values["steps"]) == ("finished", 80)
    best = min(values["evaluations"], key=lambda one: one["loss"])
    assert values["best_evaluation"] == best
    assert values["adapter_step"] == best["step"]
    assert demo.run.report_page.is_file()
    assert demo.run.loss_curve.is_file()


def test_a_stop_file_ends_the_run_after_the_step_with_the_adapter_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG, save_steps=LONG)
    handle = supervisor.start(run.path)
    wait_until(lambda: steps_seen(run) >= 2)
    supervisor.request_stop(run.path)
    status = handle.wait(600)
    assert status.state == "stopped"
    assert handle.keeper.wait(60) == RunExit.STOPPED_SAVED
    assert (run.adapter / "adapter_model.safetensors").exists()
    checkpoint = run.checkpoints / f"checkpoint-{status.step}"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "training_args.bin").exists()


@pytest.mark.parametrize("warning", [signal.SIGTERM, signal.SIGUSR1])
def test_hangup_is_ignored_and_a_warning_saves(tmp_path: Path, warning: signal.Signals) -> None:
    run = make_run(tmp_path, setup=SMALL, max_steps=LONG)
    trainer = start(run)
    wait_until(lambda: steps_seen(run) >= 1)
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGHUP)
    step = steps_seen(run)
    wait_until(lambda: steps_seen(run) > step + 2)
    os.kill(trainer.pid, STACKS_SIGNAL)
    wait_until(lambda: "in training_step" in run.log("trainer").read_text())
    beat = read_beat(run.heartbeat)
    assert beat is not None
    assert (beat.stage, beat.step > step) == ("training", True)
    os.kill(trainer.pid, warning)
    assert exit_code(trainer) == RunExit.STOPPED_SAVED
    assert supervisor.status(run.path).state == "stopped"
    assert run.adapter.exists()


def test_a_stop_ends_a_long_evaluation_without_one_more_step(tmp_path: Path) -> None:
    """After the present batch, with the step before it saved."""
    evaluated = tmp_path / "eval.jsonl"
    evaluated.write_text((DEMO / "data" / "eval.jsonl").read_text() * 20)
    run = make_run(
        tmp_path, setup=SMALL, max_steps=LONG, save_steps=LONG, eval_steps=2, eval_data_path=str(evaluated)
    )
    trainer = start(run)

    def evaluates() -> bool:
        beat = read_beat(run.heartbeat)
        return beat is not None and (beat.stage, beat.step) == ("evaluating", 2)

    wait_until(evaluates)
    os.kill(trainer.pid or 0, signal.SIGTERM)
    assert exit_code(trainer) == RunExit.STOPPED_SAVED
    end = the_end(run)
    assert (end.state, end.step) == ("stopped", 2)
    assert not any(isinstance(event, EvalEvent) for event in read_events(run.events))
    assert (run.checkpoints / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert run.adapter.exists()


def test_a_killed_trainer_is_known_as_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    trainer = start(run)
    wait_until(lambda: steps_seen(run) >= 2)
    trainer.kill()
    assert exit_code(trainer) == -signal.SIGKILL
    status = supervisor.status(run.path)
    assert (status.state, status.alive) == ("killed", False)
    assert status.step >= 2
    assert not run.adapter.exists()


def test_kill_ends_a_trainer_that_is_still_loading(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    handle = supervisor.start(run.path)
    assert supervisor.kill(run.path, patience_seconds=5)
    assert handle.wait(600).over
    assert not supervisor.kill(run.path)


@pytest.mark.parametrize("kind", ["CUDA", "CPU", "Python"])
def test_running_out_of_memory_is_told_apart(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, max_steps=6)
    assert exit_code(start(run, functools.partial(broken_steps.raises, kind))) == RunExit.OOM
    end = the_end(run)
    assert (end.state, end.step) == ("oom", BROKEN_AFTER)
    assert checkpoints.steps(run.checkpoints) == [BROKEN_AFTER]
    assert not run.adapter.exists()


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=6)
    assert exit_code(start(run, functools.partial(broken_steps.raises, "bug"))) == RunExit.BUG
    assert the_end(run).state == "failed"
    assert "KeyError: 'lost'" in the_end(run).message
    assert "Traceback" in run.log("trainer").read_text()


def test_a_poisoned_run_diverges_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run = make_run(tmp_path, max_steps=6, save_steps=1)
    assert exit_code(start(run, broken_steps.loses_a_weight)) == RunExit.DIVERGED
    end = the_end(run)
    assert (end.state, end.step) == ("diverged", BROKEN_AFTER)
    saved = sorted(path.name for path in run.checkpoints.iterdir())
    assert saved == ["checkpoint-2", "checkpoint-3"]
    weights = load_file(run.checkpoints / "checkpoint-3" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not run.adapter.exists()


@pytest.mark.parametrize(
    "change", [{"data_path": "/absent/data.jsonl"}, {"model_source": "/absent/model"}], ids=["data", "model"]
)
def test_bad_input_ends_in_one_line(tmp_path: Path, change: dict[str, str]) -> None:
    run = make_run(tmp_path, **change)
    assert exit_code(start(run)) == RunExit.BAD_INPUT
    status = supervisor.status(run.path)
    assert status.state == "refused"
    assert "/absent" in status.message
    assert "Traceback" not in run.log("trainer").read_text()


def test_no_secret_of_the_environment_reaches_the_run_folder(demo: Demo) -> None:
    files = [path for path in demo.run.path.rglob("*") if path.is_file()]
    assert demo.run.checkpoints in {path.parent.parent for path in files}
    for path in files:
        assert b"canary" not in path.read_bytes(), path


def test_a_file_beside_the_user_cannot_shadow_a_library(demo: Demo) -> None:
    assert (demo.run.path.parent / "torch.py").is_file()
    assert demo.status.state == "finished"


def test_a_second_trainer_by_hand_leaves_the_events_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=2)
    assert exit_code(start(run)) == RunExit.FINISHED
    before = run.events.read_bytes()
    assert exit_code(start(run)) == RunExit.BAD_INPUT
    assert run.events.read_bytes() == before
