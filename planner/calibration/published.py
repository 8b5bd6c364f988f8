"""Runs that others published, as setups beside the speed they give: profiles/external_runs.jsonl.

Each row names its source. No rate and no constant is fitted to any.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from typing import Any

from planner.base.data_files import PROFILES
from planner.base.errors import NotModelledError
from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.setup.stack import PLAIN_LOOP, TRL
from planner.setup.training_setup import TrainingSetup
from planner.throughput import NoForecastError, StepEstimate, estimate_step

ROWS = PROFILES / "external_runs.jsonl"
MODELS = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b-v0.3",
    "meta-llama/Llama-2-7b": "llama-2-7b",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    'meta-llama/Llama-3.1-8B ("Llama3 8B")': "llama-3.1-8b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "NousResearch/Llama-2-70b-hf": "llama-2-70b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
    "deepseek-ai/deepseek-coder-1.3b-instruct": "deepseek-coder-1.3b",
}
GPUS = {
    "A100 80GB (form factor not stated)": "a100-80gb",
    "A100 (80GB implied)": "a100-80gb",
    "A100 40GB": "a100-40gb",
    "H100 80GB SXM (DGX-H100)": "h100-80gb",
    "NVIDIA L40S": "l40s",
    "RTX 3090 24GB": "rtx-3090",
    "RTX 4090 24GB": "rtx-4090",
    "T4 16GB (14,912 MiB, ECC on)": "t4",
}
OPTIMIZERS = {
    "adamw_torch (HF default)": "adamw_torch",
    "torch AdamW": "adamw_torch",
    "torch AdamW (baseline)": "adamw_torch",
    "torch AdamW (fp32 states)": "adamw_torch",
    "torch AdamW fused": "adamw_torch_fused",
}
REAL_TOKENS = 210
"""Mean tokens of the examples of PEFT's MetaMathQA runs, which are padded to their batch's longest."""


class InexpressibleError(Exception):
    """A run that no TrainingSetup says; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRun:
    """A published run beside its forecast; `source`, `framework` and `losses` are as its row says. Both
    speeds are tokens a second of all its GPUs together.
    """

    gpu: GpuSpec
    setup: TrainingSetup
    source: str
    framework: str
    losses: str
    measured: float
    step: StepEstimate

    @property
    def forecast(self) -> float:
        """Tokens a second as forecast."""
        return self.step.tokens_per_second

    @property
    def error(self) -> float:
        """Forecast / measured - 1."""
        return self.forecast / self.measured - 1

    @property
    def covered(self) -> bool:
        """Whether the run lies in the forecast's interval."""
        return self.step.tokens_per_second_low <= self.measured <= self.step.tokens_per_second_high


def rows() -> tuple[dict[str, Any], ...]:
    """Every published run."""
    return tuple(json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines())


def setup_of(row: dict[str, Any]) -> TrainingSetup:
    """The setup that a row describes. What a source does not say is as by default: checkpointing on.

    Raises:
        InexpressibleError: a part of it has no knob here.
    """
    if row["model"].startswith("mistralai/Mixtral"):
        raise InexpressibleError("experts held in 4 bits, which transformers no longer does")
    if row["model"] not in MODELS:
        raise InexpressibleError("models outside the catalog")
    optimizer = OPTIMIZERS.get(row.get("optimizer", "torch AdamW"))
    if optimizer is None:
        raise InexpressibleError("optimizer steps inside the backward pass")
    if "torchao" in row["quant"]:
        raise InexpressibleError("torchao's 4-bit weights")
    losses, attention = row["kernels_loss"], row["attn"]
    flash = "flash" in attention or "TE attention" in attention
    knobs: dict[str, Any] = {
        "model": MODELS[row["model"]],
        "max_length": REAL_TOKENS if _padded(row) else row["seq_len"],
        "per_device_train_batch_size": row["micro_batch"],
        "gradient_accumulation_steps": row["grad_accum"],
        "method": row["method"],
        "optim": optimizer,
        "dtype": "float16" if row["precision"].startswith("fp16") else "bfloat16",
        "gradient_checkpointing": row.get("grad_ckpt", True),
        "attn_implementation": "flash_attention_2" if flash else "eager" if attention == "eager" else "sdpa",
        "kernels": "liger" if losses.startswith("foak") else "none",
        "compile": "regional" if row["compile"] else "none",
        "activation_offloading": "activation offloading" in losses,
        "prepare_for_kbit_training": row.get("kbit_prep", "").startswith("peft."),
        "use_dora": "DoRA" in losses,
    }
    if row["n_gpu"] > 1:
        knobs |= {"num_processes": row["n_gpu"], "distributed": "ddp"}
    if row["method"] == "qlora":
        knobs["bnb_4bit_use_double_quant"] = "no double-quant" not in row["quant"]
    if row["method"] != "full":
        knobs["lora_r"] = row["lora_rank"]
        knobs["target_modules"] = [name for name in row["lora_targets"] if name != "c_attn"]
        knobs["lora_dropout"] = 0.1 if "dropout 0.1" in row.get("notes", "") else 0.0
    return TrainingSetup.from_dict(knobs)


def _padded(row: dict[str, Any]) -> bool:
    return "padded to batch max" in row["seq_kind"]


def run_of(row: dict[str, Any]) -> TrainingRun:
    """The run that a row describes.

    Raises:
        InexpressibleError: a part of it has no knob here.
    """
    setup = setup_of(row)
    stack = PLAIN_LOOP if "plain loop" in row["framework"] else TRL
    return TrainingRun(setup=setup, model=load_shipped(setup.model), padded=_padded(row), stack=stack)


@lru_cache(maxsize=1)
def published_runs() -> tuple[tuple[PublishedRun, ...], Counter[str]]:
    """Every run that can be forecast, and how many cannot, by reason."""
    found, left_out = [], Counter[str]()
    for row in rows():
        gpu = gpu_catalog().get(GPUS[row["gpu"]])
        try:
            run = run_of(row)
            step = estimate_step(run, gpu)
        except (InexpressibleError, NotModelledError, NoForecastError) as reason:
            left_out[str(reason)] += 1
            continue
        found.append(
            PublishedRun(
                gpu=gpu,
                setup=run.setup,
                source=row["source_repo"],
                framework=row["framework"].split(" ")[0].rstrip(","),
                losses=row["kernels_loss"],
                measured=row["tokens_per_s"] * row["n_gpu"],
                step=step,
            )
        )
    return tuple(found), left_out
