"""config.json of a model folder or Hub repository: read within limits, checked, reduced to what matters here.

A config is input from elsewhere: its size, depth and numbers are bounded before anything is built from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.base.errors import InputError, shorten
from planner.models.checkpoint import Checkpoint, read_quantisation

MAX_CONFIG_BYTES = 2**20
MAX_DEPTH = 12
MAX_LIST_ITEMS = 10_000
MAX_TEXT = 20_000
MAX_NUMBER = 2**53

# Upper bounds, each far above any published model: they keep a hostile or broken config from being built.
INTEGER_LIMITS = {
    "num_hidden_layers": 1024,
    "num_layers": 1024,
    "n_layer": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "moe_intermediate_size": 2**21,
    "shared_expert_intermediate_size": 2**21,
    "head_dim": 2**14,
    "vocab_size": 2**23,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "n_routed_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "max_position_embeddings": 2**30,
    "sliding_window": 2**30,
}
_MAY_BE_ZERO = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
)
RECIPE_TYPES = frozenset(
    {"gemma", "gemma2", "gemma3", "gemma3_text", "granite", "llama", "ministral", "mistral", "mixtral"}
    | {"nemotron", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
)
"""model_type of the families that launcher/models/layer_recipe.py reads; all others are traced."""
PLANNED_TYPES = RECIPE_TYPES | frozenset(
    {"deepseek_v2", "gemma4", "gemma4_text", "glm4_moe", "gpt_oss", "granitemoehybrid", "llama4"}
    | {"llama4_text", "qwen2_5_vl", "qwen3_5", "qwen3_5_text", "qwen3_next"}
)
"""Those, and the types of what the catalog has by tracing, or with a vision tower."""
_NO_GGUF = "GGUF is not trained: name the model that it was made from"
# Keys that steer how transformers runs a model rather than describe it; in a config.json they are foreign.
_FOREIGN_KEYS = ("attn_implementation", "experts_implementation", "_attn_", "_flash_attn", "_experts_")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the config.json of a model folder.

    Raises:
        InputError: no folder, no config.json, unreadable, too large, not JSON, or refused by `check_config`.
    """
    if folder.is_file():
        hint = _NO_GGUF if folder.suffix.lower() == ".gguf" else "give the folder that holds config.json"
        raise InputError(f"{shorten(str(folder))} is a file; {hint}")
    if not folder.is_dir():
        raise InputError(f"no folder {shorten(str(folder))}")
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise InputError(f"no config.json in {shorten(str(folder))}{_instead_of_config(folder)}")
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {shorten(str(path))}: {error.strerror}") from error
    return parse_config(content, where=str(path))


def _instead_of_config(folder: Path) -> str:
    """What a folder without a model's config holds that may have been meant, as the end of a sentence."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        with adapter.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES)
        try:
            base = json.loads(content)["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError, RecursionError):
            base = None
        return f"; it holds an adapter: plan its base model{'' if base is None else f', {shorten(base)}'}"
    if any(folder.glob("*.gguf")):
        return f"; {_NO_GGUF}"
    return ""


def parse_config(content: bytes, *, where: str) -> dict[str, Any]:
    """Parse the bytes of a config.json and check them; `where` names the file in messages."""
    name = shorten(where)
    if len(content) > MAX_CONFIG_BYTES:
        raise InputError(f"{name} is larger than {MAX_CONFIG_BYTES:,} bytes; that is no model config")
    try:
        config = json.loads(content, parse_constant=_constant, object_hook=_infinite)
    except RecursionError as error:
        raise InputError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{name} is not valid JSON: {shorten(str(error), 80)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{name} must hold a JSON object, not {type(config).__name__}")
    check_config(config, where=where)
    return config


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a config that is out of bounds, that names code to run, or whose weights are quantised in a form
    that is not trained.

    Raises:
        InputError: which key is refused, and why.
    """
    name = shorten(where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.isprintable() or not 0 < len(model_type) <= 100:
        raise InputError(f"{name} names no model_type")
    quantisation_of(config, where=where)
    _check_value("", config, name, depth=0)


def quantisation_of(config: Mapping[str, Any], *, where: str) -> Checkpoint | None:
    """How the weights of a config are quantised; None where they are in 16 or 32 bits, or in MXFP4 that is
    dequantised while it is read.

    Raises:
        InputError: in a form that is not trained, with what to use instead.
    """
    instead = _instead_of_quantised(str(config.get("model_type")))
    return read_quantisation(config, shorten(where), instead=instead)


def _instead_of_quantised(model_type: str) -> str:
    if model_type in PLANNED_TYPES:
        return "give the model they were made from, which QLoRA quantises while loading"
    return f"vramwise plans neither these nor model_type {model_type} in 16 bits (see vramwise models)"


def _check_value(key: str, value: object, name: str, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"{name} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for inner_key, inner in value.items():
            if inner_key.startswith(_FOREIGN_KEYS):
                raise InputError(f"{name}: key {shorten(inner_key)} is no part of a published config")
            _check_value(inner_key, inner, name, depth=depth + 1)
    elif isinstance(value, list):
        if len(value) > MAX_LIST_ITEMS:
            raise InputError(f"{name}: {shorten(key)} has more than {MAX_LIST_ITEMS:,} items")
        for inner in value:
            _check_value(key, inner, name, depth=depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise InputError(f"{name}: {shorten(key)} is longer than {MAX_TEXT:,} characters")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(key, value, name)
    if key in INTEGER_LIMITS and value is not None and not isinstance(value, int | list):
        raise InputError(f"{name}: {key} is {shorten(value)}, not a whole number")


def _check_number(key: str, value: float, name: str) -> None:
    if math.isinf(value) and key not in INTEGER_LIMITS:
        return  # Mamba-2's time_step_limit has no upper end, and transformers writes it so
    if not math.isfinite(value) or abs(value) > MAX_NUMBER:
        raise InputError(f"{name}: {shorten(key)} is {shorten(value)}, which no model has")
    limit = INTEGER_LIMITS.get(key)
    if limit is None:
        return
    minimum = 0 if key in _MAY_BE_ZERO else 1
    if not isinstance(value, int) or not minimum <= value <= limit:
        raise InputError(
            f"{name}: {key} is {shorten(value)}; expected a whole number from {minimum} to {limit:,}"
        )


def _infinite(values: dict[str, Any]) -> object:
    """An object, or the number without end that transformers writes as one (configuration_utils.py)."""
    if set(values) == {"__float__"} and isinstance(values["__float__"], str):
        return _constant(values["__float__"])
    return values


def _constant(constant: str) -> float:
    """What Python's JSON has beyond JSON's: no end is a number of a config, no number is none."""
    if constant == "NaN":
        raise ValueError(f"{constant} is not a number")
    return float(constant)


def text_part(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The language model's config, and whether it was taken out of a multimodal wrapper."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(config), False
    text = dict(inner)
    if "model_type" not in text:
        raise InputError("text_config names no model_type")
    # Gemma 3 says in the wrapper's config, not in the text model's, that the head is tied.
    if "tie_word_embeddings" in config and "tie_word_embeddings" not in text:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text, True


# Keys that change neither shapes nor what a training step keeps in memory.
_IRRELEVANT = frozenset(
    {
        "architectures",
        "attention_multiplier",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embedding_multiplier",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "layer_norm_eps",
        "logits_scaling",
        "max_position_embeddings",
        "norm_topk_prob",
        "original_max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "return_dict",
        "rms_norm_eps",
        "rope_interleaved",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


def relevant_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a text config that decide shapes and memory, in one form for old and new spellings."""
    fields = {k: v for k, v in config.items() if k not in _IRRELEVANT and not k.startswith("_")}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "partial_rotary_factor" not in fields and isinstance(rope, Mapping):
        fields["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    if fields.get("use_sliding_window") is False:
        fields.pop("sliding_window", None)
        fields.pop("max_window_layers", None)
        if set(fields.get("layer_types") or ()) <= {"full_attention"}:
            fields.pop("layer_types", None)
    if "num_local_experts" in fields and config.get("model_type") == "qwen3_moe":
        fields["num_experts"] = fields.pop("num_local_experts")
    if config.get("model_type") == "gemma4_text":
        return _with_global_heads(fields)
    return fields


def _with_global_heads(fields: dict[str, Any]) -> dict[str, Any]:
    """Gemma 4's fields with its heads of full attention as its config has them, where transformers has
    written them layer by layer (configuration_gemma4.py); as they are where they differ from layer to layer.
    """
    by_layer, types = fields.get("per_layer_config"), fields.get("layer_types")
    if not isinstance(by_layer, Mapping) or not isinstance(types, list):
        return fields
    full = [index for index, kind in enumerate(types) if kind == "full_attention"]
    named = sorted(int(name) for name in by_layer if str(name).isdecimal())
    layers = [one for one in by_layer.values() if isinstance(one, Mapping)]
    heads = {(one.get("head_dim"), one.get("num_key_value_heads")) for one in layers}
    if named != full or len(layers) != len(full) or len(heads) != 1:
        return fields
    width, count = heads.pop()
    rest = {name: value for name, value in fields.items() if name != "per_layer_config"}
    return {**rest, "global_head_dim": width, "num_global_key_value_heads": count}
