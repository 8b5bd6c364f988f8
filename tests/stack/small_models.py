"""Small models with random weights: real transformers classes, shapes large enough to tell tensors apart."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.models.inspect import inspect_config
from launcher.training import build
from launcher.training.loading.quantised_experts import quantise_all
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

LAYERS, HIDDEN, VOCABULARY = 3, 512, 256
LENGTH = 64
"""Of a setup that only says how to load."""
BASE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
}
SCALED = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama"},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 128},
    "phi3": {**BASE, "model_type": "phi3", "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1},
    "gemma3": {**BASE, "model_type": "gemma3_text", "head_dim": 128, "num_attention_heads": 4},
    "olmo2": {**BASE, "model_type": "olmo2"},
    "granite": {**BASE, "model_type": "granite", **SCALED},
}
# As many key heads as query heads: in fp32 CUDA's sdpa then has a fused kernel, as the CPU's always is.
UNSHARED = {
    f"{family}_unshared": {**DENSE[family], "num_key_value_heads": DENSE[family]["num_attention_heads"]}
    for family in ("llama", "qwen3")
}
# Two query heads to a key head: with a mask a compiled layer keeps repeated values, and keys.
PAIRED = {
    f"{family}_paired": {**DENSE[family], "num_key_value_heads": DENSE[family]["num_attention_heads"] // 2}
    for family in ("llama", "qwen3")
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **BASE,
        "model_type": "qwen3_moe",
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 384,
    },
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Families without a recipe: sinks and biased experts; shared experts beside routed ones and a dense layer;
# Mamba layers beside one of attention, all with experts. None has what no step of a CPU can be compared in.
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
}
TRACED: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **SHAPE,
        "model_type": "gpt_oss",
        "head_dim": 64,
        "intermediate_size": 512,
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "pad_token_id": 0,
    },
    "glm4_moe": {
        **SHAPE,
        "model_type": "glm4_moe",
        "head_dim": 64,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
    },
    "granitemoehybrid": {
        **SHAPE,
        "model_type": "granitemoehybrid",
        "intermediate_size": 128,
        "num_local_experts": 4,
        "shared_intermediate_size": 256,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
        "position_embedding_type": "nope",
        **SCALED,
    },
}
# A vocabulary whose tables outweigh all else, tied or apart.
WIDE = {
    f"{name}_wide": {
        **SHAPE,
        "model_type": "llama",
        "intermediate_size": 512,
        "vocab_size": 6144,
        "tie_word_embeddings": tied,
    }
    for name, tied in (("llama", False), ("tied", True))
}
TINY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
}
"""Whose queries, keys and values have biases."""
FAMILIES = {
    **DENSE,
    "tiny": TINY,
    **WIDE,
    **TRACED,
    **UNSHARED,
    **PAIRED,
    **EXPERTS,
    "qwen2": {**BASE, "model_type": "qwen2", "tie_word_embeddings": True},
}


@functools.cache
def spec_of(family: str) -> ModelSpec:
    """Described once: tracing a family without a recipe takes seconds."""
    return inspect_config(FAMILIES[family], model_id=family, hub_id=family)


def load_model(family: str, setup: TrainingSetup) -> Any:
    """The base model as the launcher loads it, quantised while loading for qlora: a copy to be changed."""
    quantised = {
        "method": "qlora",
        "bnb_4bit_quant_type": setup.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": setup.bnb_4bit_use_double_quant,
        "attn_implementation": setup.attn_implementation,
        "load_in_8bit": setup.load_in_8bit,
    }
    knobs: dict[str, Any] = quantised if setup.method == "qlora" else {"method": "full"}
    loaded = _loaded(family, TrainingSetup(model=family, max_length=LENGTH, dtype=setup.dtype, **knobs))
    model = copy.deepcopy(loaded)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes copies the state of a weight and that of its module, which are one, apart.
            module.quant_state = module.weight.quant_state
            module.weight.module = module
    if setup.experts == "4bit":
        quantise_all(model, build.quantization_config(setup))
    return model


@functools.lru_cache(maxsize=16)
def _loaded(family: str, setup: TrainingSetup) -> Any:
    """Making, saving and quantising a model takes longer than most of what is asked of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=build.torch_dtype(setup))
    if setup.method != "qlora":
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return build.load_model(setup, folder, device=torch.device("cpu"), allow_download=False)


def load_scored(family: str, setup: TrainingSetup) -> Any:
    """The same model with a head of one score a token."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**FAMILIES[family], num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=build.torch_dtype(setup))
    if setup.method != "qlora":
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=build.torch_dtype(setup), quantization_config=build.quantization_config(setup)
        )
