"""LLaMA-Factory's YAML, read and written. Defaults are those of 0.9.5 (hparams/*.py) and of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.base.errors import InputError
from planner.setup.stack import LLAMA_FACTORY, TRL, Stack
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

VERSION = "0.9.5"
INSTALL = f"uv venv && uv pip install llamafactory=={VERSION} bitsandbytes"
LACKING = (
    "experts",
    "compile",
    "activation_memory_budget",
    "checkpointed_layers",
    "selective_checkpointing",
    "activation_offloading",
    "prepare_for_kbit_training",
)
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "auto": None}
_REFUSED = {
    "use_unsloth": "Unsloth's own stack",
    "use_badam": "an optimizer of blocks of layers",
    "use_galore": "gradients of low rank",
    "use_apollo": "gradients of low rank",
    "use_llama_pro": "layers that are added",
    "deepspeed": "DeepSpeed",
    "tensor_model_parallel_size": "Megatron's trainer",
    "pipeline_model_parallel_size": "Megatron's trainer",
    "expert_model_parallel_size": "Megatron's trainer",
    "additional_target": "modules that are trained whole beside the adapter",
    "mixture_of_depths": "layers that tokens pass by",
    "use_asft_loss": "a second model for the loss",
    "shift_attn": "LongLoRA's attention",
}
_NEAREST = "counted without: norms or logits in fp32 take more"


def read(values: Mapping[str, Any], *, auto_dtype: str, gpus: int) -> TrainerConfig:
    """Read a config. `auto_dtype` is the card's 16-bit type, `gpus` how many there are.

    Raises:
        InputError: a key whose memory is not known, or a value that is not accepted.
    """
    keys = Keys(values)
    keys.refuse(_REFUSED)
    if keys.text("stage", "sft") not in ("sft", "pt"):
        raise InputError(f"stage: {values['stage']!r:.60} is not planned: sft and pt are")
    if not keys.switch("do_train"):
        raise InputError("do_train is not set: the config trains nothing")
    method, pure = _method(keys), keys.switch("pure_bf16")
    if method == "full" and not pure:
        raise InputError(
            "finetuning_type: 'full' is not planned without pure_bf16: weights are trained in fp32 then"
        )
    adapter = _adapter(keys) if method != "full" else {}
    if method == "qlora":
        adapter["bnb_4bit_use_double_quant"] = keys.switch("double_quantization", default=True)
        adapter["bnb_4bit_quant_type"] = keys.text("quantization_type", "nf4")
    stack, liger = _stack(keys, pure=pure), keys.switch("enable_liger_kernel")
    keys.note("upcast_layernorm", _NEAREST)
    keys.note("upcast_lmhead_output", _NEAREST)
    keys.note("torch_compile", "whole-model compilation is counted as none")
    keys.note("use_unsloth_gc", "layer inputs are counted on the GPU")
    packs = keys.switch("neat_packing") or keys.switch("packing")
    keys.take("packing")
    setup = TrainingSetup(
        model=required("model_name_or_path", keys.text("model_name_or_path"), "LLaMA-Factory"),
        max_length=positive("cutoff_len", keys.integer("cutoff_len", 2048)),
        method=method,
        per_device_train_batch_size=positive(
            "per_device_train_batch_size", keys.integer("per_device_train_batch_size", 8)
        ),
        gradient_accumulation_steps=positive(
            "gradient_accumulation_steps", keys.integer("gradient_accumulation_steps", 1)
        ),
        dtype=_dtype(keys, auto_dtype, pure=pure),
        optim=keys.optimizer("optim", "adamw_torch_fused", {"adamw_bnb_8bit": "adamw_8bit"}),
        gradient_checkpointing=not keys.switch("disable_gradient_checkpointing"),
        attn_implementation=_attention(keys),
        kernels="liger" if liger else "none",
        packing=packs,
        train_sampling_strategy=_sampling(keys),
        **by_ddp(gpus),
        **adapter,
    )
    keys.take("use_reentrant_gc")
    return keys.config("llamafactory", stack, setup, epochs="num_train_epochs")


def write(setup: TrainingSetup, model: str, epochs: float, learning_rate: float) -> dict[str, Any]:
    """A config for a setup, all that decides its memory named, the data to be filled in.

    Raises:
        InputError: a knob that LLaMA-Factory does not have.
    """
    kept_knobs(setup, "LLaMA-Factory", LACKING)
    if setup.distributed == "fsdp":
        raise InputError(
            "LLaMA-Factory takes FSDP from a file of accelerate's, which is not written: use ddp"
        )
    if setup.attn_implementation == "flex_attention":
        raise InputError("LLaMA-Factory has no attn_implementation=flex_attention")
    found: dict[str, Any] = {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if setup.method == "full" else "lora",
    }
    found |= _what_is_trained(setup)
    found |= {
        "dataset_dir": ".",
        "dataset": "train",
        "template": "default",
        "cutoff_len": setup.max_length,
        "packing": setup.packing,
        "neat_packing": setup.packing,
        **schedule(setup, epochs, learning_rate),
        "bf16": setup.dtype == "bfloat16" and setup.method != "full",
        "fp16": setup.dtype == "float16",
        "disable_gradient_checkpointing": not setup.gradient_checkpointing,
        "use_reentrant_gc": False,
        "enable_liger_kernel": setup.kernels == "liger",
        "output_dir": "out",
    }
    if setup.attn_implementation is not None:
        words = {name: word for word, name in _ATTENTION.items()}
        found["flash_attn"] = words[setup.attn_implementation]
    if setup.train_sampling_strategy == "group_by_length":
        found["train_sampling_strategy"] = "group_by_length"
    return found


def _what_is_trained(setup: TrainingSetup) -> dict[str, Any]:
    """Keys of the adapter and of the base's quantisation, or of full fine-tuning."""
    found: dict[str, Any] = {}
    if setup.method == "full":
        found["pure_bf16"] = True
    if setup.uses_lora:
        targets = setup.target_modules
        found |= {
            "lora_rank": setup.lora_r,
            "lora_alpha": setup.alpha,
            "lora_dropout": setup.lora_dropout,
            "lora_target": "all" if isinstance(targets, str) else ",".join(targets),
            "use_dora": setup.use_dora,
            "use_rslora": setup.use_rslora,
        }
    if setup.method == "qlora":
        found |= {
            "quantization_bit": 4,
            "quantization_method": "bnb",
            "quantization_type": setup.bnb_4bit_quant_type,
            "double_quantization": setup.bnb_4bit_use_double_quant,
        }
    return found


def _method(keys: Keys) -> str:
    kind = keys.text("finetuning_type", "lora")
    bits = keys.integer("quantization_bit")
    how = keys.text("quantization_method", "bnb")
    if kind == "full":
        return "full"
    if kind != "lora":
        raise InputError(f"finetuning_type: {kind!r:.60} is not planned: lora and full are")
    if bits is None:
        return "lora"
    if bits != 4 or how not in ("bnb", "bitsandbytes"):
        raise InputError(f"quantization_bit: {bits} by {how} is not planned: 4 by bnb is")
    return "qlora"


def _adapter(keys: Keys) -> dict[str, Any]:
    rank = positive("lora_rank", keys.integer("lora_rank", 8))
    targets = keys.names("lora_target") or ("all",)
    return {
        "lora_r": rank,
        "lora_alpha": alpha_of(keys.integer("lora_alpha", 2 * rank), rank),
        "lora_dropout": keys.number("lora_dropout", 0.0),
        "target_modules": ALL_LINEAR if targets == ("all",) else targets,
        "use_dora": keys.switch("use_dora"),
        "use_rslora": keys.switch("use_rslora"),
    }


def _stack(keys: Keys, *, pure: bool) -> Stack:
    found = LLAMA_FACTORY
    if pure:
        found = replace(found, adapter_dtype="bfloat16")
    if keys.take("enable_liger_kernel"):
        keys.notes.append(
            "enable_liger_kernel: its fused loss is counted as TRL's tiled log-probabilities, not traced"
        )
        found = replace(
            found,
            head_words="Liger's fused loss, counted as tiles",
            head_tokens=TRL.head_tokens,
            head_vocabulary=TRL.head_vocabulary,
        )
    return found


def _dtype(keys: Keys, auto: str, *, pure: bool) -> str:
    half, brain = keys.switch("fp16"), keys.switch("bf16")
    if pure:
        return "bfloat16"
    if half or brain:
        return "float16" if half else "bfloat16"
    # Without either the base is loaded in the card's 16-bit type (model/patcher.py) and computed in it.
    return auto


def _attention(keys: Keys) -> str | None:
    named = keys.text("flash_attn", "auto") or "auto"
    if named == "fa3":
        keys.notes.append("flash_attn: fa3 is counted as flash_attention_2")
        return "flash_attention_2"
    if named not in _ATTENTION:
        raise InputError(f"flash_attn: {named!r:.60} is not planned: {', '.join(_ATTENTION)} are")
    return _ATTENTION[named]


def _sampling(keys: Keys) -> str:
    grouped = keys.switch("group_by_length") or keys.text("train_sampling_strategy") == "group_by_length"
    return "group_by_length" if grouped else "random"
