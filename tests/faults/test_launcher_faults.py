"""The run's processes under faults: real processes on the demo model, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import supervisor
from launcher.runs.events import (
    EndEvent,
    EvalEvent,
    LogEvent,
    MemoryEvent,
    SampleEvent,
    StartEvent,
    read_events,
)
from launcher.runs.folder import RunBusyError, RunFolder, TrainerExit, TrainingJob, create_run_folder
from planner.base.data_files import PROFILES
from planner.setup.training_setup import TrainingSetup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

DEMO = PROFILES / "demo"
ROOT = Path(__file__).resolve().parents[2]
LONG = 100_000


def make_run(root: Path, **changes: Any) -> RunFolder:
    setup = TrainingSetup(model="demo", max_length=128, per_device_train_batch_size=8)
    values: dict[str, Any] = {
        "setup": setup,
        "model_source": str(DEMO / "model"),
        "data_path": str(DEMO / "data" / "train.jsonl"),
        "learning_rate": 4e-3,
        **changes,
    }
    return create_run_folder(root, TrainingJob(**values))


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
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


def run_patched(run: RunFolder, patch: str) -> int:
    """Run the trainer in a process in which `patch` has been executed before; returns its exit code."""
    code = (
        f"import sys\n{patch}\nfrom launcher.training.train import main\nsys.exit(main([{str(run.path)!r}]))"
    )
    with run.log("trainer").open("ab") as log:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=log, stderr=log, timeout=240, check=False
        )
    return done.returncode


RAISE_IN_STEP = """
import torch
from launcher.training import callbacks as trainer_callback
real = trainer_callback.LaunchedTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 3:
        raise {error}
    return real(self, *args, **kwargs)
trainer_callback.LaunchedTrainer.training_step = training_step
"""


def test_the_demo_learns_and_its_adapter_changes_the_answer(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    from launcher.training import build

    run = make_run(tmp_path, num_train_epochs=2.0, eval_data_path=str(DEMO / "data" / "eval.jsonl"))
    reader = subprocess.Popen(
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
    handle = supervisor.start(run.path)
    with pytest.raises(RunBusyError):
        supervisor.start(run.path)
    wait_until(lambda: steps_seen(run) >= 1)
    reader.kill()
    reader.wait()
    assert handle.wait(240).state == "finished"
    assert handle.trainer.returncode == TrainerExit.FINISHED
    assert not handle.sampler.returncode
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


def test_a_stop_file_ends_the_run_after_the_step_with_the_adapter_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG, save_steps=LONG)
    handle = supervisor.start(run.path)
    wait_until(lambda: steps_seen(run) >= 2)
    supervisor.request_stop(run.path)
    status = handle.wait(60)
    assert status.state == "stopped"
    assert handle.trainer.returncode == TrainerExit.STOPPED
    assert (run.adapter / "adapter_model.safetensors").exists()
    checkpoint = run.checkpoints / f"checkpoint-{status.step}"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "training_args.bin").exists()


def test_hangup_is_ignored_and_sigterm_saves(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    handle = supervisor.start(run.path)
    wait_until(lambda: steps_seen(run) >= 1)
    os.kill(handle.trainer.pid, signal.SIGHUP)
    step = steps_seen(run)
    wait_until(lambda: steps_seen(run) > step + 2)
    os.kill(handle.trainer.pid, signal.SIGTERM)
    assert handle.wait(60).state == "stopped"
    assert run.adapter.exists()


def test_a_killed_trainer_is_known_as_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    handle = supervisor.start(run.path)
    wait_until(lambda: steps_seen(run) >= 2)
    os.kill(handle.trainer.pid, signal.SIGKILL)
    status = handle.wait(60)
    assert (status.state, status.alive) == ("killed", False)
    assert status.step >= 2
    assert not run.adapter.exists()


def test_kill_ends_a_trainer_that_is_still_loading(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=LONG)
    handle = supervisor.start(run.path)
    assert supervisor.kill(run.path, patience_seconds=5)
    assert handle.wait(60).over
    assert not supervisor.kill(run.path)


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 9 bytes')",
        "MemoryError()",
    ],
)
def test_running_out_of_memory_is_told_apart(tmp_path: Path, error: str) -> None:
    run = make_run(tmp_path, max_steps=6)
    assert run_patched(run, RAISE_IN_STEP.format(error=error)) == TrainerExit.OOM
    end = the_end(run)
    assert (end.state, end.step) == ("oom", 3)
    assert not run.adapter.exists()


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=6)
    assert run_patched(run, RAISE_IN_STEP.format(error="KeyError('lost')")) == TrainerExit.FAILED
    assert the_end(run).state == "failed"
    assert "KeyError: 'lost'" in the_end(run).message
    assert "Traceback" in run.log("trainer").read_text()


def test_a_poisoned_run_diverges_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run = make_run(tmp_path, max_steps=6, save_steps=1)
    patch = RAISE_IN_STEP.replace("raise {error}", "return_nan(self)").replace(
        "import torch",
        "import torch\ndef return_nan(self):\n    w = next(p for p in self.model.parameters()"
        " if p.requires_grad)\n    w.data.fill_(float('nan'))",
    )
    assert run_patched(run, patch) == TrainerExit.DIVERGED
    end = the_end(run)
    assert (end.state, end.step) == ("diverged", 3)
    saved = sorted(path.name for path in run.checkpoints.iterdir())
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    weights = load_file(run.checkpoints / "checkpoint-3" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not run.adapter.exists()


@pytest.mark.parametrize(
    "change", [{"data_path": "/absent/data.jsonl"}, {"model_source": "/absent/model"}], ids=["data", "model"]
)
def test_bad_input_ends_in_one_line(tmp_path: Path, change: dict[str, str]) -> None:
    run = make_run(tmp_path, **change)
    handle = supervisor.start(run.path)
    status = handle.wait(120)
    assert (status.state, handle.trainer.returncode) == ("failed", TrainerExit.BAD_INPUT)
    assert "/absent" in status.message
    assert "Traceback" not in run.log("trainer").read_text()


def test_no_secret_of_the_environment_reaches_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_token_0123456789")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_canary_0123456789")
    run = make_run(tmp_path, max_steps=2, save_steps=1)
    assert supervisor.start(run.path).wait(120).state == "finished"
    for path in run.path.rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes(), path


def test_a_file_beside_the_user_cannot_shadow_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, max_steps=1)
    assert supervisor.start(run.path).wait(120).state == "finished"


def test_a_second_trainer_by_hand_leaves_the_events_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=2)
    assert run_patched(run, "") == TrainerExit.FINISHED
    before = run.events.read_bytes()
    assert run_patched(run, "") == TrainerExit.BAD_INPUT
    assert run.events.read_bytes() == before
    assert json.loads(run.identity("trainer").read_text())["pid"]
