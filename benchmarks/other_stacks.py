"""Memory of other trainers' stacks on a GPU, beside what is counted for their configs.

    python -m benchmarks.other_stacks run MEASURED.jsonl [--only TRAINER] [--shrink]
    python -m benchmarks.other_stacks judge MEASURED.jsonl

`run` trains three steps of each setup in a process of its own, with random weights of the published shapes.
`trl sft` is TRL's own command line, started with the YAML that is judged. The stacks with all logits are
transformers' Trainer with PEFT's adapters as Axolotl and LLaMA-Factory leave them; neither is installed.
What torch's allocator held at most is read at the process's end. `judge` needs no GPU: it gives the same
YAML to `vramwise estimate --config` and writes results/other_stacks.json. `--shrink` cuts the models down, to
try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.results import write_result

STEPS = 3
GPU = "h200"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
LIMIT_SECONDS = 150
ALLOCATORS = {"native": "", "expandable": "expandable_segments:True"}
PEAKS = "VRAMWISE_BENCHMARK_PEAKS"

HOOK = f"""
import atexit, json, os, sys
def tell():
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    peaks = {{"gpu": torch.cuda.get_device_name()}}
    peaks["allocated_bytes"] = torch.cuda.max_memory_allocated()
    peaks["reserved_bytes"] = torch.cuda.max_memory_reserved()
    with open(os.environ["{PEAKS}"], "a") as file:
        file.write(json.dumps(peaks) + "\\n")
atexit.register(tell)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A config of a trainer: its YAML's keys but for the model, and the model it is run with."""

    name: str
    trainer: str
    model: str
    hub_id: str
    allocator: str
    keys: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The YAML as `vramwise estimate --config` is given it."""
        key = "base_model" if self.trainer == "axolotl" else "model_name_or_path"
        return {key: self.hub_id, **self.keys}


_QLORA = {"load_in_4bit": True, "use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"}
_FACTORY = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all"}
_AXOLOTL = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 16, "lora_alpha": 32, "bf16": True}
_BATCH = "per_device_train_batch_size"

CASES = (
    Case(
        name="trl sft, QLoRA",
        trainer="trl",
        model="llama-3.2-3b",
        hub_id="meta-llama/Llama-3.2-3B",
        allocator="native",
        keys={**_QLORA, "dataset_name": "data", "max_length": 2048, _BATCH: 4},
    ),
    Case(
        name="trl sft, LoRA without checkpointing",
        trainer="trl",
        model="qwen2.5-1.5b",
        hub_id="Qwen/Qwen2.5-1.5B",
        allocator="native",
        keys={
            "use_peft": True,
            "lora_r": 32,
            "lora_target_modules": "all-linear",
            "dtype": "bfloat16",
            "dataset_name": "data",
            "max_length": 1024,
            _BATCH: 2,
            "gradient_checkpointing": False,
        },
    ),
    Case(
        name="LLaMA-Factory's stack, QLoRA",
        trainer="llamafactory",
        model="llama-3.2-3b",
        hub_id="meta-llama/Llama-3.2-3B",
        allocator="native",
        keys={
            **_FACTORY,
            "quantization_bit": 4,
            "lora_rank": 16,
            "cutoff_len": 2048,
            _BATCH: 4,
            "bf16": True,
        },
    ),
    Case(
        name="LLaMA-Factory's stack, LoRA",
        trainer="llamafactory",
        model="qwen2.5-1.5b",
        hub_id="Qwen/Qwen2.5-1.5B",
        allocator="native",
        keys={**_FACTORY, "lora_rank": 8, "cutoff_len": 1024, _BATCH: 8, "bf16": True},
    ),
    Case(
        name="Axolotl's stack, QLoRA",
        trainer="axolotl",
        model="llama-3.1-8b",
        hub_id="meta-llama/Llama-3.1-8B",
        allocator="expandable",
        keys={
            **_AXOLOTL,
            "lora_target_linear": True,
            "sequence_len": 2048,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "optimizer": "adamw_torch_fused",
            "datasets": [{"path": "data", "type": "completion"}],
        },
    ),
    Case(
        name="Axolotl's stack, QLoRA with attention's adapters, 8-bit optimizer",
        trainer="axolotl",
        model="qwen2.5-7b",
        hub_id="Qwen/Qwen2.5-7B",
        allocator="expandable",
        keys={
            **_AXOLOTL,
            "lora_target_modules": ["q_proj", "v_proj"],
            "sequence_len": 1024,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "optimizer": "adamw_bnb_8bit",
            "datasets": [{"path": "data", "type": "completion"}],
        },
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("run", run), ("judge", judge)):
        one = commands.add_parser(name)
        one.add_argument("measured", type=Path)
        one.set_defaults(does=does)
        if name == "run":
            one.add_argument("--only", choices=sorted({case.trainer for case in CASES}))
            one.add_argument("--shrink", action="store_true")
    child = commands.add_parser("child")
    child.add_argument("case", type=int)
    child.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "child":
        train_with_all_logits(CASES[arguments.case], arguments.folder)
    else:
        arguments.does(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train each case in a process of its own and append what was held at most."""
    for index, case in enumerate(CASES):
        if arguments.only not in (None, case.trainer):
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "hook").mkdir()
            (folder / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
            write_model(case, folder, shrink=arguments.shrink)
            command = (
                trl_command(case, folder, shrink=arguments.shrink)
                if case.trainer == "trl"
                else [sys.executable, "-m", "benchmarks.other_stacks", "child", str(index), str(folder)]
            )
            ended = subprocess.run(
                command,
                env=_environment(case, folder),
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
            peaks = most_held(folder / "peaks.jsonl")
        found = {"name": case.name, "code": ended.returncode, **peaks, "versions": _versions()}
        if ended.returncode != 0:
            found["log"] = ended.stderr[-1500:]
        with arguments.measured.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(case.name, ended.returncode, peaks, found.get("log", "")[-300:], flush=True)


def most_held(path: Path) -> dict[str, Any]:
    """Peaks of the process that trained: accelerate's own, which starts it, asks the GPU for nothing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return max(found, key=lambda one: one["allocated_bytes"], default={})


def judge(arguments: argparse.Namespace) -> None:
    """Compare with what the same YAML is estimated at, and write the result."""
    lines = [json.loads(line) for line in arguments.measured.read_text(encoding="utf-8").splitlines()]
    measured = {line["name"]: line for line in lines if line.get("allocated_bytes")}
    rows = []
    for case in CASES:
        if case.name not in measured:
            continue
        one, counted = measured[case.name], estimated(case)
        row: dict[str, Any] = {"name": case.name, "config": case.config}
        for figure in ("allocated_bytes", "reserved_bytes"):
            row[figure] = {"measured": one[figure], "estimated": counted[figure]}
            row[figure]["error"] = round(counted[figure] / one[figure] - 1, 5)
        rows.append(row)
        print(f"{case.name}: allocated {row['allocated_bytes']}, reserved {row['reserved_bytes']}")
    errors = [abs(row["allocated_bytes"]["error"]) for row in rows]
    environment = {"gpu": lines[0].get("gpu"), "versions": lines[0]["versions"]}
    write_result(
        "other_stacks", {"median_error": statistics.median(errors), "rows": rows, "measured_on": environment}
    )


def estimated(case: Case) -> dict[str, Any]:
    """`vramwise estimate --config` of the case's YAML, on the card that it was run on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{case.trainer}.yaml"
        path.write_text(json.dumps(case.config), encoding="utf-8")
        command = [sys.executable, "-m", "launcher.cli", "estimate", "--config", str(path), "--gpu", GPU]
        told = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout)["estimate"]
    return found


def write_model(case: Case, folder: Path, *, shrink: bool) -> None:
    """What the case trains: shapes in a config, random weights where TRL loads them, long examples."""
    from launcher.measuring.measured_run import _tokenizer, load_config

    config = load_config(case.model)
    if shrink:
        config.num_hidden_layers = 2
        config.layer_types = ["full_attention"] * 2
        config.hidden_size, config.intermediate_size, config.vocab_size = 128, 256, 4096
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 32
    model = folder / "model"
    config.save_pretrained(model)
    if case.trainer != "trl":
        return
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    _tokenizer().save_pretrained(model)
    (folder / "data").mkdir()
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 3000})
    count = STEPS * case.keys[_BATCH] * 2
    (folder / "data" / "train.jsonl").write_text((row + "\n") * count, encoding="utf-8")


def trl_command(case: Case, folder: Path, *, shrink: bool) -> list[str]:
    """TRL's own command line on the YAML, with nothing beside it that changes memory."""
    config = {
        **case.config,
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
    }
    path = folder / "sft.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    rest = {"output_dir": folder / "out", "max_steps": STEPS, "save_strategy": "no", "report_to": "none"}
    rest |= {"use_cpu": True} if shrink else {}
    options = [word for key, value in rest.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "trl.cli.main", "sft", "--config", str(path), *options]


def train_with_all_logits(case: Case, folder: Path) -> None:
    """Three steps of transformers' Trainer with PEFT's adapter, fp32 on whatever base, and its own loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, BitsAndBytesConfig, Trainer, TrainingArguments

    from launcher.measuring.random_weights import build_random_model
    from planner.trainers.files import trainer_of

    setup = trainer_of(case.config).read(case.config, auto_dtype="bfloat16", gpus=1).setup
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
    path = os.pathsep.join(filter(None, (str(folder / "hook"), root, os.environ.get("PYTHONPATH"))))
    return {
        **{key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key},
        **({"PYTORCH_CUDA_ALLOC_CONF": ALLOCATORS[case.allocator]} if ALLOCATORS[case.allocator] else {}),
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        PEAKS: str(folder / "peaks.jsonl"),
    }


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
