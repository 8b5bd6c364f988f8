"""A run of `vramwise train`, merged by `vramwise merge`: the merged model answers as the adapter did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.runs.folder import RunFolder
from launcher.training import build
from planner.base.data_files import PROFILES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DEMO = PROFILES / "demo"
QUESTIONS = ("What are 6 kilometres in metres?", "Hello, I am Emil.", "What is the opposite of early?")
TRAINING = (
    *("--model", str(DEMO / "model"), "--data", str(DEMO / "data" / "train.jsonl"), "--gpu", "16GB"),
    *("--eval-data", str(DEMO / "data" / "eval.jsonl"), "--assistant-only-loss", "--max-steps", "40"),
    *("--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1", "--learning-rate", "3e-3"),
    # Processors without units for bfloat16 take a hundred times as long for it.
    *("--dtype", "float32"),
)


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


def test_the_merged_model_answers_as_the_adapter_on_its_base_in_4_bits(tmp_path: Path) -> None:
    trained = vramwise(tmp_path, "train", *TRAINING, "--runs", str(tmp_path), "--name", "run")
    assert trained.returncode == 0, trained.stderr
    merged = vramwise(tmp_path, "merge", str(tmp_path / "run"))
    assert merged.returncode == 0, merged.stderr
    out = tmp_path / "run" / "merged"
    assert f"vllm serve {out}\n" in merged.stdout
    facts = json.loads((out / "merge.json").read_text())
    kept = facts["measured"][facts["merged_into"]]
    assert kept["kl"] < facts["measured"]["base without adapter"]["kl"] / 100
    assert kept["same_top"] > 0.95

    run = RunFolder(tmp_path / "run")
    job = run.read_job()
    base = build.load_model(job.setup, job.model_source, device=torch.device("cpu"), allow_download=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    by_adapter = answers(PeftModel.from_pretrained(base, str(run.adapter)), tokenizer)
    by_merged = answers(AutoModelForCausalLM.from_pretrained(out), tokenizer)
    untrained = answers(AutoModelForCausalLM.from_pretrained(DEMO / "model"), tokenizer)
    assert all(text.startswith("Ahoy! ") for text in by_adapter), by_adapter
    assert not any(text.startswith("Ahoy! ") for text in untrained), untrained
    # Greedy text may part where two tokens are as likely as each other.
    assert sum(one == other for one, other in zip(by_adapter, by_merged, strict=True)) >= 2, by_merged
