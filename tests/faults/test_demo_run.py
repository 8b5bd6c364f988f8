"""A run of the demo, started beside traps, seen to learn, reported, and merged by `vramwise merge`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.runs import supervisor
from launcher.runs.ends import RunExit
from launcher.runs.events import (
    EvalEvent,
    LogEvent,
    MemoryEvent,
    SampleEvent,
    StartEvent,
    read_events,
)
from launcher.runs.folder import RunBusyError, RunFolder
from launcher.training import build
from tests.faults.demo_runs import DEMO, make_run, steps_seen, the_end, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("What are 6 kilometres in metres?", "Hello, I am Emil.", "What is the opposite of early?")
SECRETS = {"HF_TOKEN": "hf_canary_token_0123456789", "WANDB_API_KEY": "wandb_canary_0123456789"}


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
    run = make_run(folder, max_steps=80, save_steps=40, eval_data_path=str(DEMO / "data" / "eval.jsonl"))
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


def test_no_secret_of_the_environment_reaches_the_run_folder(demo: Demo) -> None:
    files = [path for path in demo.run.path.rglob("*") if path.is_file()]
    assert demo.run.checkpoints in {path.parent.parent for path in files}
    for path in files:
        assert b"canary" not in path.read_bytes(), path


def test_a_file_beside_the_user_cannot_shadow_a_library(demo: Demo) -> None:
    assert (demo.run.path.parent / "torch.py").is_file()
    assert demo.status.state == "finished"


def vramwise(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *arguments],
        env={**os.environ, "VRAMWISE_DATA_DIR": str(tmp_path / "own"), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def answers(model: Any, tokenizer: Any) -> list[str]:
    found = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        found.append(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def test_the_merged_model_answers_as_the_adapter_on_its_base_in_4_bits(demo: Demo, tmp_path: Path) -> None:
    merged = vramwise(tmp_path, "merge", str(demo.run.path))
    assert merged.returncode == 0, merged.stderr
    out = demo.run.path / "merged"
    assert f"vllm serve {out}\n" in merged.stdout
    facts = json.loads((out / "merge.json").read_text())
    kept = facts["measured"][facts["merged_into"]]
    assert kept["kl"] < facts["measured"]["base without adapter"]["kl"] / 100
    assert kept["same_top"] > 0.95

    run = demo.run
    job = run.read_job()
    base = build.load_model(job.setup, job.model_source, device=torch.device("cpu"), allow_download=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    by_adapter = answers(PeftModel.from_pretrained(base, str(run.adapter)), tokenizer)
    by_merged = answers(AutoModelForCausalLM.from_pretrained(out), tokenizer)
    untrained = answers(AutoModelForCausalLM.from_pretrained(DEMO / "model"), tokenizer)
    assert all(text.startswith("Ahoy! ") for text in by_adapter), by_adapter
    assert not any(text.startswith("Ahoy! ") for text in untrained), untrained
    # Greedy text parts where two tokens are as likely as each other, a name for another: processors decide.
    alike = [SequenceMatcher(None, *both).ratio() for both in zip(by_adapter, by_merged, strict=True)]
    assert min(alike) > 0.8, (by_adapter, by_merged)
