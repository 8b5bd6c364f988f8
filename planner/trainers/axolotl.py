"""Axolotl's YAML, read and written. Defaults are those of 0.21.0 (utils/schemas/*.py, loaders/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.base.errors import InputError
from planner.setup.stack import AXOLOTL, TRL, Stack
from planner.setup.training_setup import ALL_LINEAR, TrainingSetup
from planner.trainers.config import Keys, TrainerConfig, alpha_of, kept_knobs, positive, required

VERSION = "0.21.0"
INSTALL = f"uv venv --python 3.12 && uv pip install --no-build-isolation axolotl=={VERSION}"
LACKING = (
    "experts",
    "compile",
    "activation_memory_budget",
    "checkpointed_layers",
    "selective_checkpointing",
    "prepare_for_kbit_training",
    "kernels",
)
"""What it has not, or only otherwise: its regional compile refuses checkpointing, its selective checkpointing
keeps by other rules, and its kernels of Liger come as plugins."""
_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
_BACKENDS = {"flash": "flash_attention_2", "sdp": "sdpa", "flex": "flex_attention"}
_FUSED = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
_CUT_PLUGIN = "CutCrossEntropyPlugin"
"""axolotl/integrations/cut_cross_entropy/args.py: cut_cross_entropy is true where nothing else is said."""
_LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation")
_OPTIMIZERS = {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
_REFUSED = {
    "rl": "another objective than supervised fine-tuning",
    "reward_model": "another objective than supervised fine-tuning",
    "process_reward_model": "another objective than supervised fine-tuning",
    "load_in_8bit": "a base in 8 bits",
    "gptq": "a base in another quantisation",
    "relora": "adapters that are merged on the way",
    "lora_modules_to_save": "modules that are trained whole beside the adapter",
    "unfrozen_parameters": "some of the base's parameters are trained",
    "qat": "quantisation-aware training",
    "deepspeed": "DeepSpeed",
    "is_multimodal": "images",
    "processor_type": "images",
    "quantize_moe_experts": "experts in 4 bits",
}


def read(values: Mapping[str, Any], *, auto_dtype: str, gpus: int) -> TrainerConfig:
    """Read a config. `auto_dtype` is what `auto` means on the card, `gpus` how many there are.

    Raises:
        InputError: a key whose memory is not known, or a value that is not accepted.
    """
    keys = Keys(values)
    keys.refuse(_REFUSED)
    if (keys.integer("context_parallel_size", 1) or 1) > 1:
        raise InputError("context_parallel_size is not planned: sequences shared out over GPUs")
    method = _method(keys)
    adapter = _adapter(keys) if method != "full" else {}
    if method == "qlora":
        options = keys.take("bnb_config_kwargs") or {}
        adapter["bnb_4bit_use_double_quant"] = bool(options.get("bnb_4bit_use_double_quant", True))
        adapter["bnb_4bit_quant_type"] = options.get("bnb_4bit_quant_type", "nf4")
    stack = _stack(keys)
    offloads = _offloads(keys)
    setup = TrainingSetup(
        model=required("base_model", keys.text("base_model"), "Axolotl"),
        max_length=positive("sequence_len", keys.integer("sequence_len", 512)),
        method=method,
        per_device_train_batch_size=positive("micro_batch_size", keys.integer("micro_batch_size", 1)),
        gradient_accumulation_steps=positive(
            "gradient_accumulation_steps", keys.integer("gradient_accumulation_steps", 1)
        ),
        dtype=_dtype(keys, auto_dtype),
        optim=keys.optimizer("optimizer", "adamw_torch_fused", _OPTIMIZERS),
        gradient_checkpointing=offloads or keys.switch("gradient_checkpointing"),
        activation_offloading=offloads,
        attn_implementation=_attention(keys),
        kernels="liger" if _liger(keys) else "none",
        packing=keys.switch("sample_packing"),
        train_sampling_strategy="group_by_length" if keys.switch("group_by_length") else "random",
        **_sharing(keys, gpus),
        **adapter,
    )
    keys.note("torch_compile", "whole-model compilation is counted as none")
    keys.note("selective_checkpointing", "counted as whole checkpoints")
    return keys.config("axolotl", stack, setup, epochs="num_epochs")


def write(setup: TrainingSetup, model: str, epochs: float, learning_rate: float) -> dict[str, Any]:
    """A config for a setup, all that decides its memory named, the data to be filled in.

    Raises:
        InputError: a knob that Axolotl does not have.
    """
    kept_knobs(setup, "Axolotl", LACKING)
    if setup.activation_offloading and not setup.gradient_checkpointing:
        raise InputError("Axolotl has no activation_offloading without gradient_checkpointing")
    found: dict[str, Any] = {"base_model": model}
    if setup.uses_lora:
        found |= {
            "adapter": setup.method,
            "load_in_4bit": setup.method == "qlora",
            "lora_r": setup.lora_r,
            "lora_alpha": setup.alpha,
            "lora_dropout": setup.lora_dropout,
        }
        if setup.target_modules == ALL_LINEAR:
            found["lora_target_linear"] = True
        else:
            found["lora_target_modules"] = list(setup.target_modules)
        found |= {"peft_use_dora": setup.use_dora, "peft_use_rslora": setup.use_rslora}
    if setup.method == "qlora":
        found["bnb_config_kwargs"] = {
            "bnb_4bit_use_double_quant": setup.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_type": setup.bnb_4bit_quant_type,
        }
    found |= {
        "datasets": [{"path": "train.jsonl", "ds_type": "json", "type": "chat_template"}],
        "sequence_len": setup.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": setup.packing,
        "micro_batch_size": setup.per_device_train_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "num_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "optimizer": setup.optim,
        "bf16": setup.dtype == "bfloat16",
        "fp16": setup.dtype == "float16",
        "gradient_checkpointing": setup.gradient_checkpointing,
        "group_by_length": setup.train_sampling_strategy == "group_by_length",
        "output_dir": "out",
    }
    if setup.gradient_checkpointing:
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        found["activation_offloading"] = setup.activation_offloading
    if setup.attn_implementation is not None:
        found["attn_implementation"] = setup.attn_implementation
    if setup.distributed == "fsdp":
        found |= {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    return found


def _method(keys: Keys) -> str:
    adapter, four = keys.text("adapter"), keys.switch("load_in_4bit")
    if adapter is None:
        if four:
            raise InputError("load_in_4bit without an adapter trains nothing")
        return "full"
    if adapter not in ("lora", "qlora"):
        raise InputError(f"adapter: {adapter!r:.60} is not planned: lora and qlora are")
    return "qlora" if four or adapter == "qlora" else "lora"


def _adapter(keys: Keys) -> dict[str, Any]:
    rank = positive("lora_r", keys.integer("lora_r"))
    return {
        "lora_r": rank,
        "lora_alpha": alpha_of(keys.integer("lora_alpha", 2 * rank), rank),
        "lora_dropout": keys.number("lora_dropout", 0.0),
        "target_modules": _targets(keys),
        "use_dora": keys.switch("peft_use_dora"),
        "use_rslora": keys.switch("peft_use_rslora"),
    }


def _targets(keys: Keys) -> str | tuple[str, ...]:
    named = keys.names("lora_target_modules")
    if keys.switch("lora_target_linear") or named == (ALL_LINEAR,):
        return ALL_LINEAR
    if named is None:
        raise InputError("lora_target_modules or lora_target_linear is required with an adapter")
    return named


def _dtype(keys: Keys, auto: str) -> str:
    half = keys.take("fp16")
    wide = keys.take("float32")
    brain = keys.take("bf16")
    if half:
        return "float16"
    if wide and not brain:
        return "float32"
    return auto if brain in (None, "auto") else "bfloat16" if brain else "float32"


_OFFLOADING = ("offload", "offload_disk", "unsloth")
"""Words of gradient_checkpointing for inputs of layers that go to the host."""


def _offloads(keys: Keys) -> bool:
    """Whether inputs of layers go to the host: by a switch, a kind, or a word of gradient_checkpointing."""
    kind, word = keys.take("activation_offloading"), keys.take("gradient_checkpointing")
    keys.take("gradient_checkpointing_kwargs")
    return word in _OFFLOADING or (bool(kind) and bool(word))


def _attention(keys: Keys) -> str | None:
    named = keys.text("attn_implementation") or keys.text("attn_backend")
    set_flags = [name for flag, name in _ATTENTION.items() if keys.take(flag)]
    if keys.note("xformers_attention", "counted as flash_attention_2"):
        return "flash_attention_2"
    if named is not None:
        found = _BACKENDS.get(named, named)
        if found in ("xformers", "sage", "flash_attention_3", "kernels-community/flash-attn2"):
            keys.notes.append(f"attn_implementation: {found} is counted as flash_attention_2")
            return "flash_attention_2"
        return found
    return set_flags[0] if set_flags else None


def _stack(keys: Keys) -> Stack:
    found = AXOLOTL
    _switch_by_plugin(keys)
    for key in _FUSED:
        if keys.note(key, "counted as TRL's tiled log-probabilities; its own tiles were not traced"):
            found = replace(
                found,
                head_words=f"{key}, counted as tiles",
                head_tokens=TRL.head_tokens,
                head_vocabulary=TRL.head_vocabulary,
            )
            break
    if keys.take("peft_autocast_adapter_dtype") is False:
        found = replace(found, adapter_dtype="bfloat16")
    return found


def _switch_by_plugin(keys: Keys) -> None:
    """The plugin of cut cross entropy is on where the config lists it and says nothing else of it."""
    plugins = keys.take("plugins") or ()
    listed = isinstance(plugins, list) and any(str(one).endswith(_CUT_PLUGIN) for one in plugins)
    if listed and keys.take(_FUSED[0]) is None:
        keys.imply(_FUSED[0], value=True)


def _liger(keys: Keys) -> bool:
    asked = [key for key in (*_LIGER, "liger_swiglu", "liger_layer_norm") if keys.take(key)]
    if all(key in asked or (key == "liger_glu_activation" and "liger_swiglu" in asked) for key in _LIGER):
        return True
    if asked:
        keys.notes.append(f"{', '.join(asked)}: some of Liger's kernels alone are counted as none")
    return False


def _sharing(keys: Keys, gpus: int) -> dict[str, Any]:
    config = keys.take("fsdp_config")
    sharded = bool(config or keys.take("fsdp"))
    version = keys.integer("fsdp_version", 2)
    if gpus == 1:
        if sharded:
            keys.notes.append("fsdp_config: on one GPU nothing is shared out")
        return {}
    if isinstance(config, dict) and (config.get("offload_params") or config.get("fsdp_offload_params")):
        raise InputError("fsdp_config: offload_params is not planned: weights on the host")
    if sharded and version != 2:
        keys.notes.append("fsdp_version: counted as FSDP2")
    return {"num_processes": gpus, "distributed": "fsdp" if sharded else "ddp"}
