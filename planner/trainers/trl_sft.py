"""The YAML of TRL's command line, `trl sft --config`.

Defaults are those of TRL 1.16 (trl/trainer/sft_config.py, model_config.py) and of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.errors import InputError
from planner.setup.stack import TRL_SFT
from planner.setup.training_setup import ALL_LINEAR, TrainingSetup
from planner.trainers.config import (
    Keys,
    TrainerConfig,
    alpha_of,
    by_ddp,
    kept_knobs,
    positive,
    required,
    schedule,
)

VERSION = "1.16.0"
INSTALL = f"uv venv && uv pip install 'trl[peft,quantization]=={VERSION}'"
TRL_DTYPE = "float32"
"""Of the weights where nothing names another (trl/trainer/model_config.py:89)."""
LACKING = (
    "experts",
    "compile",
    "activation_memory_budget",
    "checkpointed_layers",
    "selective_checkpointing",
    "prepare_for_kbit_training",
)
_REFUSED = {
    "load_in_8bit": "a base in 8 bits",
    "lora_modules_to_save": "modules that are trained whole beside the adapter",
    "lora_target_parameters": "parameters that are no modules",
    "deepspeed": "DeepSpeed",
    "fsdp": "FSDP by the trainer's own argument; a file of accelerate's is read",
    "teacher_model_name_or_path": "another objective than supervised fine-tuning",
}


def read(values: Mapping[str, Any], *, auto_dtype: str, gpus: int) -> TrainerConfig:
    """Read a config. `auto_dtype` is the card's 16-bit type, `gpus` how many there are.

    Raises:
        InputError: a key whose memory is not known, or a value that is not accepted.
    """
    keys = Keys(values)
    keys.refuse(_REFUSED)
    four, peft = keys.switch("load_in_4bit"), keys.switch("use_peft")
    if four and not peft:
        raise InputError("load_in_4bit without use_peft trains nothing")
    method = "qlora" if four else "lora" if peft else "full"
    loss = keys.text("loss_type", "nll")
    if loss not in ("nll", "chunked_nll"):
        raise InputError(f"loss_type: {loss!r:.60} is not planned: nll is")
    adapter = _adapter(keys) if peft else {}
    if four:
        adapter["bnb_4bit_use_double_quant"] = keys.switch("use_bnb_nested_quant")
        adapter["bnb_4bit_quant_type"] = keys.text("bnb_4bit_quant_type", "nf4")
    keys.note("torch_compile", "whole-model compilation is counted as none")
    setup = TrainingSetup(
        model=required("model_name_or_path", keys.text("model_name_or_path"), "trl sft"),
        max_length=positive("max_length", keys.integer("max_length", 1024)),
        method=method,
        per_device_train_batch_size=positive(
            "per_device_train_batch_size", keys.integer("per_device_train_batch_size", 8)
        ),
        gradient_accumulation_steps=positive(
            "gradient_accumulation_steps", keys.integer("gradient_accumulation_steps", 1)
        ),
        dtype=_dtype(keys, auto_dtype),
        optim=keys.optimizer("optim", "adamw_torch_fused", {"adamw_bnb_8bit": "adamw_8bit"}),
        gradient_checkpointing=_checkpointing(keys),
        activation_offloading=keys.switch("activation_offloading"),
        attn_implementation=keys.text("attn_implementation"),
        kernels="liger" if keys.switch("use_liger_kernel") else "none",
        packing=keys.switch("packing"),
        train_sampling_strategy=keys.text("train_sampling_strategy", "random") or "random",
        **by_ddp(gpus),
        **adapter,
    )
    keys.take("packing_strategy")
    return keys.config("trl", TRL_SFT, setup, epochs="num_train_epochs")


def write(setup: TrainingSetup, model: str, epochs: float, learning_rate: float) -> dict[str, Any]:
    """A config for a setup, all that decides its memory named, the data to be filled in.

    Raises:
        InputError: a knob that the command line does not have.
    """
    kept_knobs(setup, "trl sft", LACKING)
    if setup.use_dora:
        raise InputError("trl sft has no DoRA with a base in 4 bits that was tried: leave use_dora out")
    found: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": "json",
        "dtype": setup.dtype,
    }
    if setup.uses_lora:
        targets = setup.target_modules
        found |= {
            "use_peft": True,
            "lora_r": setup.lora_r,
            "lora_alpha": setup.alpha,
            "lora_dropout": setup.lora_dropout,
            "lora_target_modules": targets if isinstance(targets, str) else list(targets),
            "use_rslora": setup.use_rslora,
        }
    if setup.method == "qlora":
        found |= {
            "load_in_4bit": True,
            "use_bnb_nested_quant": setup.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_type": setup.bnb_4bit_quant_type,
        }
    found |= {
        "max_length": setup.max_length,
        "packing": setup.packing,
        **schedule(setup, epochs, learning_rate),
        "bf16": setup.dtype == "bfloat16",
        "fp16": setup.dtype == "float16",
        "gradient_checkpointing": setup.gradient_checkpointing,
        "activation_offloading": setup.activation_offloading,
        "use_liger_kernel": setup.kernels == "liger",
        "train_sampling_strategy": setup.train_sampling_strategy,
        "output_dir": "out",
    }
    if setup.gradient_checkpointing:
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if setup.attn_implementation is not None:
        found["attn_implementation"] = setup.attn_implementation
    return found


def _adapter(keys: Keys) -> dict[str, Any]:
    rank = positive("lora_r", keys.integer("lora_r", 16))
    targets = keys.names("lora_target_modules")
    if targets is None:
        raise InputError(
            "lora_target_modules is required with use_peft: PEFT's own default depends on the model's family"
        )
    return {
        "lora_r": rank,
        "lora_alpha": alpha_of(keys.integer("lora_alpha", 32), rank),
        "lora_dropout": keys.number("lora_dropout", 0.05),
        "target_modules": ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
        "use_dora": keys.switch("use_dora"),
        "use_rslora": keys.switch("use_rslora"),
    }


def _dtype(keys: Keys, auto: str) -> str:
    named = keys.text("dtype") or keys.text("torch_dtype") or TRL_DTYPE
    if keys.switch("fp16"):
        return "float16"
    if named == "float32" and keys.take("bf16") is not False:
        raise InputError(
            "trl sft holds weights in float32 unless a dtype is named, and computes in bfloat16 beside them, "
            "which is not planned: add dtype: bfloat16, which takes about half of it, or bf16: false"
        )
    keys.take("bf16")
    return auto if named == "auto" else named


def _checkpointing(keys: Keys) -> bool:
    keys.take("gradient_checkpointing_kwargs")
    keys.take("activation_checkpointing_kwargs")
    newer = keys.take("activation_checkpointing")
    older = keys.switch("gradient_checkpointing", default=True)
    return older if newer is None else keys.switch("activation_checkpointing")
