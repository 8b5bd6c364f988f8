"""Forecasts beside runs that others published: `python -m benchmarks.external_runs [--groups]`.

Reads profiles/external_runs.jsonl, where each row names its source; none is fitted. Prints the table of
docs/throughput.md, or with `--groups` the errors by what the runs have in common.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.base.data_files import PROFILES
from planner.base.errors import NotModelledError
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import NoForecastError, estimate_step

ROWS = PROFILES / "external_runs.jsonl"
MODELS = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    'meta-llama/Llama-3.1-8B ("Llama3 8B")': "llama-3.1-8b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "NousResearch/Llama-2-70b-hf": "llama-2-70b",
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
}
GPUS = {
    "A100 80GB (form factor not stated)": "a100-80gb",
    "A100 (80GB implied)": "a100-80gb",
    "H100 80GB SXM (DGX-H100)": "h100-80gb",
    "RTX 4090 24GB": "rtx-4090",
}
OPTIMIZERS = {
    "adamw_torch (HF default)": "adamw_torch",
    "torch AdamW": "adamw_torch",
    "torch AdamW (baseline)": "adamw_torch",
    "torch AdamW fused": "adamw_torch_fused",
}


class InexpressibleError(Exception):
    """A run that no TrainingSetup says; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalRun:
    """A published run beside its forecast; `framework` and `losses` as its source says."""

    gpu: str
    setup: TrainingSetup
    framework: str
    losses: str
    measured: float
    forecast: float

    @property
    def error(self) -> float:
        """Forecast / measured - 1."""
        return self.forecast / self.measured - 1


def rows() -> tuple[dict[str, Any], ...]:
    """Every published run of one GPU."""
    return tuple(json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines())


def setup_of(row: dict[str, Any]) -> TrainingSetup:
    """The setup that a row describes.

    Raises:
        InexpressibleError: a part of it has no knob here.
    """
    if row["model"].startswith("mistralai/Mixtral"):
        raise InexpressibleError("experts held in 4 bits, which transformers no longer does")
    if row["model"] not in MODELS:
        raise InexpressibleError("models outside the catalog")
    if row["optimizer"] not in OPTIMIZERS:
        raise InexpressibleError("optimizer steps inside the backward pass")
    if "torchao" in row["quant"]:
        raise InexpressibleError("torchao's 4-bit weights")
    losses = row["kernels_loss"]
    fused = losses.startswith("foak")
    knobs: dict[str, Any] = {
        "model": MODELS[row["model"]],
        "max_length": row["seq_len"],
        "per_device_train_batch_size": row["micro_batch"],
        "gradient_accumulation_steps": row["grad_accum"],
        "method": row["method"],
        "optim": OPTIMIZERS[row["optimizer"]],
        "gradient_checkpointing": row["grad_ckpt"],
        "attn_implementation": "flash_attention_2"
        if "flash" in row["attn"] or "TE" in row["attn"]
        else "sdpa",
        "kernels": "liger" if fused else "none",
        "compile": "regional" if row["compile"] else "none",
        "activation_offloading": "activation offloading" in losses,
        "prepare_for_kbit_training": row.get("kbit_prep", "").startswith("peft."),
    }
    if row["method"] != "full":
        knobs["lora_r"] = row["lora_rank"]
        knobs["target_modules"] = [name for name in row["lora_targets"] if name != "c_attn"]
        knobs["lora_dropout"] = 0.1 if "dropout 0.1" in row.get("notes", "") else 0.0
    return TrainingSetup.from_dict(knobs)


def forecasts() -> tuple[tuple[ExternalRun, ...], Counter[str]]:
    """Forecasts of every run that can be expressed, and how many could not, by reason."""
    found, left_out = [], Counter[str]()
    for row in rows():
        gpu = gpu_catalog().get(GPUS[row["gpu"]])
        try:
            setup = setup_of(row)
            step = estimate_step(TrainingRun(setup=setup, model=load_shipped(setup.model)), gpu)
        except (InexpressibleError, NotModelledError, NoForecastError) as reason:
            left_out[str(reason)] += 1
            continue
        found.append(
            ExternalRun(
                gpu=gpu.id,
                setup=setup,
                framework=row["framework"].split(" ")[0],
                losses=row["kernels_loss"],
                measured=row["tokens_per_s"],
                forecast=step.tokens_per_second,
            )
        )
    return tuple(found), left_out


def table() -> str:
    """The table of docs/throughput.md and what it leaves out, as Markdown."""
    found, left_out = forecasts()
    lines = [
        "| GPU | model | method | kernels and loss | batch | measured | forecast | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(found, key=_order):
        setup = run.setup
        batch = f"{setup.per_device_train_batch_size} x {setup.max_length:,}"
        cells = (run.gpu, setup.model, _method(setup), f"{run.framework}: {_short(run)}", batch)
        numbers = f"{run.measured:,.0f} | {run.forecast:,.0f} | {run.error:+.0%}"
        lines.append(f"| {' | '.join(cells)} | {numbers} |")
    a100 = [run for run in found if run.gpu == "a100-80gb"]
    summary = (
        f"A100: {len(a100)} runs, {_summary(a100)}. Of {len(rows())} published runs of one GPU "
        f"{sum(left_out.values())} are left out: "
        + "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        + "."
    )
    return "\n".join(["", *lines, "", *_wrapped(summary), ""])


def _order(run: ExternalRun) -> tuple[object, ...]:
    setup = run.setup
    return (run.gpu, setup.model, setup.method, run.losses, setup.per_device_train_batch_size, -run.measured)


def _method(setup: TrainingSetup) -> str:
    kinds = [setup.method + ("" if setup.method == "full" else f" r{setup.lora_r}")]
    kinds += ["compiled"] if setup.compile != "none" else []
    kinds += ["not checkpointed"] if not setup.gradient_checkpointing else []
    kinds += ["offloaded"] if setup.activation_offloading else []
    return ", ".join(kinds)


def _short(run: ExternalRun) -> str:
    if not run.losses.startswith("foak"):
        return "chunked loss" if "Chunked" in run.losses else "full logits"
    return "fused, " + ("fused linear loss" if "Liger" in run.losses else "full logits")


def _summary(runs: Sequence[ExternalRun]) -> str:
    errors = [run.error for run in runs]
    sizes = sorted(map(abs, errors))
    return (
        f"median error {statistics.median(sizes):.0%}, 90th percentile {sizes[int(0.9 * len(sizes))]:.0%}, "
        f"bias {statistics.fmean(errors):+.0%}"
    )


def _wrapped(text: str) -> Iterable[str]:
    import textwrap

    return textwrap.wrap(text, 118)


GROUPS: dict[str, Callable[[ExternalRun], object]] = {
    "GPU": lambda run: run.gpu,
    "framework": lambda run: run.framework,
    "method": lambda run: run.setup.method,
    "loss": lambda run: _short(run),
    "model": lambda run: run.setup.model,
    "batch": lambda run: run.setup.per_device_train_batch_size,
    "compiled": lambda run: run.setup.compile,
    "method and loss": lambda run: (run.setup.method, _short(run)),
}


def groups() -> str:
    """Errors by what runs have in common."""
    found, _ = forecasts()
    lines = []
    for name, key in GROUPS.items():
        by: dict[object, list[ExternalRun]] = {}
        for run in found:
            by.setdefault(key(run), []).append(run)
        lines += [f"{name} {value}: {len(runs)} runs, {_summary(runs)}" for value, runs in by.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(groups() if "--groups" in sys.argv[1:] else table())
