"""One contender of benchmarks.rivals in a process of its own: `python -m benchmarks.rival_child KIND JSON`.

Prints a JSON line for each micro-batch it ran. KIND is trl, vramwise, unsloth, or checkpoint (which writes
the folder that Unsloth loads). Imports are made late: Unsloth has to be imported first and brings a stack of
its own, in which neither the launcher nor the planner is used.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

STACK = (
    *("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"),
    *("unsloth", "unsloth_zoo", "xformers", "vramwise"),
)
SEED = 0
CONTEXT_BYTES = int(0.52 * 2**30)
"""Of a process that has used CUDA for one tensor, on the measured GPU (NVML)."""
LONG_RUN_STEPS = 1000
"""What trainers are told; Unsloth compiles less when a run is short. A callback ends it."""
LORA = {"r": 16, "lora_alpha": 32}
UNSLOTH_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    kind, task = sys.argv[1], json.loads(sys.argv[2])
    kinds = {"trl": _trl, "vramwise": _vramwise, "unsloth": _unsloth}
    if kind == "checkpoint":
        write_checkpoint(task)
        return
    for measured in kinds[kind](task):
        print(
            json.dumps({"contender": kind, "card": task["card"], **measured, **_environment(task)}),
            flush=True,
        )


def _device(task: dict[str, Any]) -> Any:
    import torch

    return torch.device(task["device"])


def _rows(vocab_size: int, task: dict[str, Any]) -> Any:
    """The same random tokens for every contender, all examples full."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(SEED)
    count = task["effective_batch_size"] * task["steps"]
    shape = (count, task["max_length"])
    rows = torch.randint(0, vocab_size, shape, generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _take_the_rest(task: dict[str, Any]) -> None:
    """Cap the allocator, and hold what the smaller card lacks outside it, as another process would.

    Libraries that ask the driver how much is free are then told what the smaller card would have.
    """
    import torch

    cap = task["memory_cap_bytes"]
    if task["device"] == "cpu" or cap is None:
        return
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    surplus = free - (task["usable_bytes"] - CONTEXT_BYTES)
    if surplus > 0:
        driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
        code = driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(surplus))
        if code != 0:
            raise RuntimeError(f"CUDA error {code} for {surplus:,} bytes")


def _clock(seconds: list[float], steps: int) -> Any:
    """Times optimizer steps from end to end, the GPU's work included, and stops after so many."""
    import torch
    from transformers import TrainerCallback

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = wait()
            seconds.append(now - self.started)
            self.started = now
            control.should_training_stop = len(seconds) == steps

    return Clock()


def _train(trainer: Any, task: dict[str, Any], micro: int) -> dict[str, Any]:
    """Train and say what was measured; running out of memory is an outcome."""
    import torch

    seconds: list[float] = []
    trainer.add_callback(_clock(seconds, task["steps"]))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    outcome = "ok"
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        outcome = "oom"
    timed = seconds[task["warm_up_steps"] :]
    tokens = task["effective_batch_size"] * task["max_length"]
    on_gpu = torch.cuda.is_available()
    return {
        "outcome": outcome,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": task["effective_batch_size"] // micro,
        "step_seconds": [round(one, 4) for one in seconds],
        "tokens_per_second": round(tokens * len(timed) / sum(timed), 1)
        if timed and outcome == "ok"
        else None,
        "allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "memory_cap_bytes": task["memory_cap_bytes"],
        "loss": [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log],
    }


def _arguments(task: dict[str, Any], micro: int, folder: str) -> dict[str, Any]:
    """What every contender is told: batch, length, steps, and to write nothing."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": task["effective_batch_size"] // micro,
        "max_length": task["max_length"],
        "max_steps": LONG_RUN_STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "use_cpu": task["device"] == "cpu",
    }


def _random_model(task: dict[str, Any], quantization_config: Any, dtype: Any) -> Any:
    from launcher.measuring.measured_run import load_config
    from launcher.measuring.random_weights import build_random_model

    config = load_config(task["model"])
    for name, value in task.get("config", {}).items():
        setattr(config, name, value)
    return build_random_model(
        config,
        dtype=dtype,
        device=_device(task),
        attn_implementation=None,
        quantization_config=quantization_config,
    )


def _nf4() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    folder = Path(__file__).resolve().parents[1] / "profiles" / "demo" / "model"
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _trl(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What guides tell: TRL's own trainer and defaults, QLoRA, micro-batch 1 with accumulation."""
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    _take_the_rest(task)
    model = _random_model(task, _nf4(), torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**_arguments(task, 1, folder), gradient_checkpointing=True),
            train_dataset=_rows(model.config.vocab_size, task),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        yield {**_train(trainer, task, 1), "setup": "TRL defaults"}


def _vramwise(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The planned setup, built as the launcher builds it."""
    from launcher.runs.training_job import TrainingJob
    from launcher.training import build
    from planner.setup.training_setup import TrainingSetup

    setup = TrainingSetup.from_dict(task["setup"])
    _take_the_rest(task)
    model = _random_model(task, build.quantization_config(setup), build.torch_dtype(setup))
    job = TrainingJob(setup=setup, model_source=setup.model, data_path="random", max_steps=LONG_RUN_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.build_trainer(
            setup,
            job,
            model=model,
            tokenizer=_tokenizer(),
            train_dataset=_rows(model.config.vocab_size, task),
            eval_dataset=None,
            output_dir=Path(folder),
            on_gpu=task["device"] != "cpu",
        )
        yield {**_train(trainer, task, setup.per_device_train_batch_size), "setup": task["described"]}


def _unsloth(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Unsloth with what its notebooks set; micro-batches from the smallest, until memory runs out."""
    os.environ["UNSLOTH_PADDING_CHOICE"] = task["padding_choice"]
    import unsloth

    is_cpu = task["device"] == "cpu"
    # Its trainer patches trl's: it has to come after unsloth.
    from trl import SFTConfig, SFTTrainer

    _take_the_rest(task)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        task["checkpoint"],
        max_seq_length=task["max_length"],
        load_in_4bit=True,
        use_exact_model_name=True,
        local_files_only=True,
    )
    vocab_size = model.config.vocab_size
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        **LORA,
        target_modules=UNSLOTH_TARGETS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    )
    assert model.get_input_embeddings().weight.shape[0] == vocab_size, "embeddings were resized"
    data = _rows(vocab_size, task).remove_columns("labels")
    for micro in task["micro_batches"]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    **_arguments(task, micro, folder), optim="adamw_torch" if is_cpu else "adamw_8bit"
                ),
                train_dataset=data,
                processing_class=tokenizer,
            )
            measured = _train(trainer, task, micro)
            attention = "sdpa" if is_cpu else _attention()
            told = {
                "setup": f"gradient checkpointing unsloth, attention {attention}",
                "fast_lora_layers": _fast_layers(model),
                "padding_choice": task["padding_choice"],
                "padding_free": trainer.args.padding_free,
                "optim": str(trainer.args.optim.value),
            }
            yield {**measured, **told}
        if measured["outcome"] == "oom":
            return
        del trainer
        gc.collect()
        _forget_cache()


def _fast_layers(model: Any) -> int:
    """Attention blocks that run Unsloth's fused LoRA kernels."""
    found = (getattr(module, "apply_qkv", None) for module in model.modules())
    return sum(getattr(function, "__name__", "") == "apply_lora_qkv" for function in found)


def _attention() -> str:
    from unsloth.utils.attention_dispatch import select_attention_backend

    return f"{select_attention_backend()}, without padding {select_attention_backend(use_varlen=True)}"


def _forget_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_checkpoint(task: dict[str, Any]) -> None:
    """A folder with random weights in NF4 and a tokenizer, as published 4-bit checkpoints are."""
    import torch

    folder = Path(task["checkpoint"])
    model = _random_model(task, _nf4(), torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tokenizer = _tokenizer()
    assert len(tokenizer) <= model.config.vocab_size
    tokenizer.save_pretrained(folder)


def _environment(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    versions = {}
    for package in STACK:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cuda": torch.version.cuda,
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


if __name__ == "__main__":
    main()
