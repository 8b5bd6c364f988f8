"""Memory of other trainers' stacks on a GPU, beside what is counted for their configs.

    python -m benchmarks.other_stacks run MEASURED.jsonl [--only TRAINER] [--together] [--shrink]
    python -m benchmarks.other_stacks judge MEASURED.jsonl

`run` trains three steps of each setup in a process of its own, with random weights of the published shapes.
`trl sft` is the script that TRL's command line starts, `trl/scripts/sft.py`, given the YAML that is judged,
on models of the published widths and a few layers: its weights pass through a file. The stacks with all
logits are transformers' Trainer with PEFT's adapters as Axolotl and LLaMA-Factory leave them; neither is
installed. What torch's allocator held at most is read when the training is over. `judge` needs no GPU: it
gives the same YAML to `vramwise estimate --config` and writes results/other_stacks.json. `--together` starts
all processes at once: each has an allocator of its own. `--shrink` cuts the models down, to try the script
where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, write_result
from benchmarks.stack_cases import BATCH, CASES, Case

STEPS = 3
GPU = "h200"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
LIMIT_SECONDS = 150
ALLOCATORS = {"native": "", "expandable": "expandable_segments:True"}
PEAKS = "peaks.json"
RESULT = FOLDER / "other_stacks.json"
WORDS = "the quick brown fox jumps over the lazy dog "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("run", run), ("judge", judge), ("child", child)):
        one = commands.add_parser(name)
        one.set_defaults(does=does)
        if name == "child":
            one.add_argument("case", type=int)
            one.add_argument("folder", type=Path)
        else:
            one.add_argument("measured", type=Path)
        if name == "run":
            one.add_argument("--only", choices=sorted({case.trainer for case in CASES}))
            one.add_argument("--together", action="store_true")
        if name != "judge":
            one.add_argument("--shrink", action="store_true")
    arguments = parser.parse_args()
    arguments.does(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train each case in a process of its own and append what was held at most, as it comes."""
    chosen = [index for index, case in enumerate(CASES) if arguments.only in (None, case.trainer)]
    with ThreadPoolExecutor(max_workers=len(chosen) if arguments.together else 1) as pool:
        for found in pool.map(lambda index: measured(index, shrink=arguments.shrink), chosen):
            with arguments.measured.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(found, flush=True)


def measured(index: int, *, shrink: bool) -> dict[str, Any]:
    """What a case held at most in a process of its own, or the end of what that wrote where it failed."""
    case, began = CASES[index], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.other_stacks", "child", str(index), name]
        with (folder / "log").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(
                [*command, *(["--shrink"] if shrink else [])],
                env=_environment(case, folder),
                stdout=log,
                stderr=log,
            )
            try:
                child.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        found = {"name": case.name, "code": child.returncode, "versions": _versions()}
        found["seconds"] = round(time.monotonic() - began, 1)
        peaks = folder / PEAKS
        if peaks.exists():
            found |= json.loads(peaks.read_text(encoding="utf-8"))
        else:
            found["log"] = (folder / "log").read_text(encoding="utf-8", errors="replace")[-1500:]
    return found


def child(arguments: argparse.Namespace) -> None:
    """Train a case and write what torch's allocator held at most, and when each part was done."""
    import torch

    began, done = time.monotonic(), {}
    case, folder = CASES[arguments.case], arguments.folder
    write_config(case, folder / "model", shrink=arguments.shrink)
    if case.trainer == "trl":
        write_what_is_read(folder)
        done["model_written"] = time.monotonic() - began
        train_by_trl(case, folder)
    else:
        train_with_all_logits(case, folder)
    done["trained"] = time.monotonic() - began
    peaks: dict[str, Any] = {"seconds_of_parts": {key: round(value, 1) for key, value in done.items()}}
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.get_device_name()
        peaks["allocated_bytes"] = torch.cuda.max_memory_allocated()
        peaks["reserved_bytes"] = torch.cuda.max_memory_reserved()
    (folder / PEAKS).write_text(json.dumps(peaks), encoding="utf-8")


def judge(arguments: argparse.Namespace) -> None:
    """Compare with what the same YAML is estimated at; rows of the result not measured anew stay."""
    lines = [json.loads(line) for line in arguments.measured.read_text(encoding="utf-8").splitlines()]
    held = {line["name"]: line for line in lines if line.get("allocated_bytes")}
    rows = {row["name"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}
    for case in CASES:
        if case.name not in held:
            continue
        one, counted = held[case.name], estimated(case)
        row: dict[str, Any] = {"name": case.name, "config": case.config(case.hub_id)}
        row |= {} if case.layers is None else {"layers": case.layers}
        for figure in ("allocated_bytes", "reserved_bytes"):
            row[figure] = {"measured": one[figure], "estimated": counted[figure]}
            row[figure]["error"] = round(counted[figure] / one[figure] - 1, 5)
        row["measured_on"] = {"gpu": one["gpu"], "versions": one["versions"]}
        rows[case.name] = row
        print(f"{case.name}: allocated {row['allocated_bytes']}, reserved {row['reserved_bytes']}")
    ordered = [rows[case.name] for case in CASES if case.name in rows]
    errors = [abs(row["allocated_bytes"]["error"]) for row in ordered]
    write_result("other_stacks", {"median_error": statistics.median(errors), "rows": ordered})


def estimated(case: Case) -> dict[str, Any]:
    """`vramwise estimate --config` of the case's YAML, on the card that it was run on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = case.hub_id
        if case.layers is not None:
            write_config(case, folder / "model", shrink=False)
            model = str(folder / "model")
        path = folder / f"{case.trainer}.yaml"
        path.write_text(json.dumps(case.config(model)), encoding="utf-8")
        command = [sys.executable, "-m", "launcher.cli", "estimate", "--config", str(path), "--gpu", GPU]
        told = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout)["estimate"]
    return found


def write_config(case: Case, model: Path, *, shrink: bool) -> None:
    """The config.json of what the case trains."""
    from launcher.measuring.measured_run import load_config

    config = load_config(case.model)
    if shrink:
        config.hidden_size, config.intermediate_size, config.vocab_size = 64, 128, 4096
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    layers = 2 if shrink else case.layers
    if layers is not None:
        config.num_hidden_layers = layers
        config.layer_types = ["full_attention"] * layers
    config.save_pretrained(model)


def write_what_is_read(folder: Path) -> None:
    """What TRL's script reads beside the config: weights, a tokenizer, a few examples that are long enough.

    Weights are one block of random values again and again: drawing them all takes longer than training.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.measuring.measured_run import _tokenizer

    model = folder / "model"
    with torch.device("meta"):
        parameters = dict(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).named_parameters()
        )
    block = torch.randn(2**20).mul_(0.02).to(torch.bfloat16)
    weights = {
        name: block.repeat(1 + one.numel() // block.numel())[: one.numel()].view(one.shape)
        for name, one in parameters.items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save_pretrained(model)
    (folder / "data").mkdir()
    length = max(case.keys["max_length"] for case in CASES if case.trainer == "trl")
    row = json.dumps({"text": WORDS * (length // 9)}) + "\n"
    count = STEPS * max(case.keys[BATCH] for case in CASES if case.trainer == "trl")
    (folder / "data" / "train.jsonl").write_text(row * count, encoding="utf-8")


def train_by_trl(case: Case, folder: Path) -> None:
    """TRL's own script on the YAML, with nothing beside it that changes memory, as `trl sft` starts it."""
    import torch

    config = {**case.config(str(folder / "model")), "dataset_name": str(folder / "data")}
    path = folder / "sft.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    rest = {"output_dir": folder / "out", "max_steps": STEPS, "save_strategy": "no", "report_to": "none"}
    rest |= {} if torch.cuda.is_available() else {"use_cpu": True}
    options = [word for key, value in rest.items() for word in (f"--{key}", str(value))]
    sys.argv = ["sft.py", "--config", str(path), *options]
    runpy.run_module("trl.scripts.sft", run_name="__main__")


def train_with_all_logits(case: Case, folder: Path) -> None:
    """Three steps of transformers' Trainer with PEFT's adapter, fp32 on whatever base, and its own loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, BitsAndBytesConfig, Trainer, TrainingArguments

    from launcher.measuring.random_weights import build_random_model
    from planner.trainers.files import trainer_of

    written = case.config(case.hub_id)
    setup = trainer_of(written).read(written, auto_dtype="bfloat16", gpus=1).setup
    config = AutoConfig.from_pretrained(folder / "model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=setup.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=setup.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = build_random_model(
        config,
        dtype=torch.bfloat16,
        device=device,
        attn_implementation=None,
        quantization_config=quantization if setup.method == "qlora" else None,
    )
    targets = setup.target_modules if setup.target_modules == "all-linear" else list(setup.target_modules)
    model = get_peft_model(
        base, LoraConfig(r=setup.lora_r, target_modules=targets, task_type="CAUSAL_LM", lora_alpha=32)
    )
    if setup.gradient_checkpointing:
        model.enable_input_require_grads()
    size, length = setup.per_device_train_batch_size, setup.max_length
    rows = torch.randint(0, config.vocab_size, (STEPS * size, length)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=size,
        max_steps=STEPS,
        bf16=True,
        gradient_checkpointing=setup.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim={"adamw_8bit": "adamw_bnb_8bit"}.get(setup.optim, setup.optim),
        save_strategy="no",
        report_to=[],
        use_cpu=device.type == "cpu",
    )
    dataset = [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=_together).train()


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def _environment(case: Case, folder: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {
        **{key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key},
        **({"PYTORCH_CUDA_ALLOC_CONF": ALLOCATORS[case.allocator]} if ALLOCATORS[case.allocator] else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
