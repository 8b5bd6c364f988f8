"""Configs of other trainers that `benchmarks.other_stacks` runs: two of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BATCH = "per_device_train_batch_size"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A config of a trainer: its YAML's keys but for the model, and the model it is run with.

    Of its layers the first `layers` alone, where that is given.
    """

    name: str
    trainer: str
    model: str
    hub_id: str
    allocator: str
    keys: Mapping[str, Any]
    layers: int | None = None

    def config(self, model: str) -> dict[str, Any]:
        """The YAML as `vramwise estimate --config` is given it, for a model's name or folder."""
        key = "base_model" if self.trainer == "axolotl" else "model_name_or_path"
        return {key: model, **self.keys}


_QLORA = {"load_in_4bit": True, "use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"}
_FACTORY = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all"}
_AXOLOTL = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 16, "lora_alpha": 32, "bf16": True}

CASES = (
    Case(
        name="trl sft, QLoRA",
        trainer="trl",
        model="llama-3.2-3b",
        hub_id="meta-llama/Llama-3.2-3B",
        allocator="native",
        layers=8,
        keys={**_QLORA, "dtype": "bfloat16", "dataset_name": "data", "max_length": 2048, BATCH: 4},
    ),
    Case(
        name="trl sft, LoRA without checkpointing",
        trainer="trl",
        model="qwen2.5-1.5b",
        hub_id="Qwen/Qwen2.5-1.5B",
        allocator="native",
        layers=8,
        keys={
            "use_peft": True,
            "lora_r": 32,
            "lora_target_modules": "all-linear",
            "dtype": "bfloat16",
            "dataset_name": "data",
            "max_length": 1024,
            BATCH: 2,
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
            BATCH: 4,
            "bf16": True,
        },
    ),
    Case(
        name="LLaMA-Factory's stack, LoRA",
        trainer="llamafactory",
        model="qwen2.5-1.5b",
        hub_id="Qwen/Qwen2.5-1.5B",
        allocator="native",
        keys={**_FACTORY, "lora_rank": 8, "cutoff_len": 1024, BATCH: 8, "bf16": True},
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
