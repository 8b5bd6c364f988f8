"""A transformers decoder layer, read into a LayerSpec; anything not understood raises and is named.

What a forward pass does cannot be seen from a module's children, so each class named here was read in
transformers 5.23 (models/<family>/modeling_<family>.py). A class outside the tables is refused, and so is one
whose children differ from what its family had when it was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from planner.base.errors import InputError
from planner.models.spec import LayerSpec

_PRE_NORM = frozenset({"input_layernorm", "post_attention_layernorm"})
_POST_NORM = frozenset({"post_attention_layernorm", "post_feedforward_layernorm"})
_SANDWICH = _PRE_NORM | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}

# Decoder layer class -> its norms. Each forward pass is norm, attention, residual, norm, MLP, residual.
DECODER_LAYERS: dict[str, frozenset[str]] = {
    "LlamaDecoderLayer": _PRE_NORM,
    "MistralDecoderLayer": _PRE_NORM,
    "MinistralDecoderLayer": _PRE_NORM,
    "MixtralDecoderLayer": _PRE_NORM,
    "Qwen2DecoderLayer": _PRE_NORM,
    "Qwen2_5_VLDecoderLayer": _PRE_NORM,
    "Qwen3DecoderLayer": _PRE_NORM,
    "Qwen3MoeDecoderLayer": _PRE_NORM,
    "GemmaDecoderLayer": _PRE_NORM,
    "Phi3DecoderLayer": _PRE_NORM,
    "SmolLM3DecoderLayer": _PRE_NORM,
    "GraniteDecoderLayer": _PRE_NORM,
    "NemotronDecoderLayer": _PRE_NORM,
    "Gemma2DecoderLayer": _SANDWICH,
    "Gemma3DecoderLayer": _SANDWICH,
    "Olmo2DecoderLayer": _POST_NORM,
    "Olmo3DecoderLayer": _POST_NORM,
}

# RMSNorm as Llama's: weight * x.to(dtype). Gemma's and OLMo 2's multiply in fp32 and cast the product
# (modeling_gemma2.py:58, modeling_olmo2.py:64). Nemotron's is torch's layer norm with weight + 1.
NORMS: dict[str, str] = {
    **dict.fromkeys(
        (
            "LlamaRMSNorm",
            "MistralRMSNorm",
            "MinistralRMSNorm",
            "MixtralRMSNorm",
            "Qwen2RMSNorm",
            "Qwen2_5_VLRMSNorm",
            "Qwen3RMSNorm",
            "Qwen3MoeRMSNorm",
            "Phi3RMSNorm",
            "SmolLM3RMSNorm",
            "GraniteRMSNorm",
        ),
        "rms",
    ),
    **dict.fromkeys(
        ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Olmo2RMSNorm", "Olmo3RMSNorm"), "rms_fp32_weight"
    ),
    "NemotronLayerNorm1P": "layernorm",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """What the forward pass of an attention class does beyond its projections.

    `window` says where its sliding window is: nowhere, on the module ("module"), or in the config whatever
    the layer ("config"). `softcap`: passes attn_logit_softcapping on (Gemma 2; Gemma 3 keeps it unused).
    `concatenates`: puts rotated and unrotated parts together with torch.cat (modeling_phi3.py:192).
    """

    qk_norm: str = "none"
    window: str = "none"
    softcap: bool = False
    concatenates: bool = False


_ATTENTIONS: dict[str, _Attention] = {
    "LlamaAttention": _Attention(),
    "GemmaAttention": _Attention(),
    "GraniteAttention": _Attention(),
    "NemotronAttention": _Attention(concatenates=True),
    "MistralAttention": _Attention(window="config"),
    "MixtralAttention": _Attention(window="config"),
    "Phi3Attention": _Attention(window="config", concatenates=True),
    "MinistralAttention": _Attention(window="module"),
    "Qwen2Attention": _Attention(window="module"),
    "Qwen2_5_VLAttention": _Attention(window="module"),
    "Qwen3Attention": _Attention(qk_norm="head", window="module"),
    "Qwen3MoeAttention": _Attention(qk_norm="head", window="module"),
    "Gemma2Attention": _Attention(window="module", softcap=True),
    "Gemma3Attention": _Attention(qk_norm="head", window="module"),
    "SmolLM3Attention": _Attention(window="module"),
    "Olmo2Attention": _Attention(qk_norm="full"),
    "Olmo3Attention": _Attention(qk_norm="full", window="module"),
}

# Act(gate) * up, then down; Phi-3's computes both halves in one projection, Nemotron's has no gate.
_GATED_MLPS = frozenset(
    f"{family}MLP"
    for family in (
        "Llama",
        "Mistral",
        "Ministral",
        "Qwen2",
        "Qwen3",
        "Qwen3Moe",
        "Gemma",
        "Gemma2",
        "Gemma3",
        "SmolLM3",
        "Granite",
        "Olmo2",
        "Olmo3",
    )
)
_EXPERT_BLOCKS = frozenset({"MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock"})


def read_layer(layer: Any, config: Any, rotary: Any, index: int) -> LayerSpec:
    """Read one decoder layer.

    Args:
        layer: The module.
        config: The model's config.
        rotary: The model's rotary embedding module.
        index: The layer's position.

    Raises:
        InputError: the class, a child or a setting that the recipe does not know.
    """
    norms = DECODER_LAYERS.get(_class(layer))
    if norms is None:
        raise InputError(f"decoder layer {_class(layer)} is not understood")
    dropouts = {name for name, child in layer.named_children() if _class(child) == "Dropout"}
    _expect_children(layer, required=norms | {"self_attn", "mlp"}, optional=dropouts)
    if any(getattr(layer, name).p > 0 for name in dropouts):
        raise InputError(f"dropout on the residual stream of {_class(layer)} is not understood")
    kinds = {norm_kind(getattr(layer, name)) for name in norms}
    if len(kinds) != 1:
        raise InputError(f"{_class(layer)} mixes norms: {', '.join(sorted(kinds))}")
    return LayerSpec(
        indices=(index,),
        norm=kinds.pop(),
        input_norms="input_layernorm" in norms,
        output_norms="post_feedforward_layernorm" in norms,
        residual_multiplier=hasattr(layer, "residual_multiplier"),
        **_read_attention(layer.self_attn, config, rotary),
        **_read_mlp(layer.mlp, config),
    )


def norm_kind(norm: Any) -> str:
    """Kind of a norm module, as LayerSpec names it."""
    kind = NORMS.get(_class(norm))
    if kind is None:
        raise InputError(f"norm {_class(norm)} is not understood")
    return kind


def _read_attention(attention: Any, config: Any, rotary: Any) -> dict[str, Any]:
    facts = _ATTENTIONS.get(_class(attention))
    if facts is None:
        raise InputError(f"attention {_class(attention)} is not understood")
    fused = hasattr(attention, "qkv_proj")
    projections = {"qkv_proj", "o_proj"} if fused else {"q_proj", "k_proj", "v_proj", "o_proj"}
    qk_norms = {"q_norm", "k_norm"} if facts.qk_norm != "none" else set()
    _expect_children(attention, required=projections | qk_norms)
    for name in projections:
        _expect_class(getattr(attention, name), "Linear")
    heads, head_dim = config.num_attention_heads, attention.head_dim
    kv_heads = heads // attention.num_key_value_groups
    query, key_value = heads * head_dim, kv_heads * head_dim
    if fused:
        _expect_size("qkv_proj", attention.qkv_proj.out_features, query + 2 * key_value)
    else:
        _expect_size("q_proj", attention.q_proj.out_features, query)
        _expect_size("k_proj", attention.k_proj.out_features, key_value)
        _expect_size("v_proj", attention.v_proj.out_features, key_value)
    if qk_norms:
        norm_kind(attention.q_norm)
        _expect_size(
            "q_norm", attention.q_norm.weight.numel(), head_dim if facts.qk_norm == "head" else query
        )
    rotary_dim = _rotary_dim(rotary)
    return {
        "hidden_size": attention.o_proj.out_features,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "qk_norm": facts.qk_norm,
        "fused_qkv": fused,
        "rotary": bool(getattr(attention, "use_rope", True)),
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
        "rotary_concatenated": facts.concatenates,
        "sliding_window": _window(attention, config, facts),
        "attention_softcap": facts.softcap and attention.attn_logit_softcapping is not None,
        "attention_dropout": float(attention.attention_dropout or 0.0),
    }


def _window(attention: Any, config: Any, facts: _Attention) -> int | None:
    if facts.window == "none":
        return None
    window = attention.sliding_window if facts.window == "module" else config.sliding_window
    return None if window is None else int(window)


def _rotary_dim(rotary: Any) -> int:
    sizes = {2 * b.numel() for name, b in rotary.named_buffers() if name.endswith("inv_freq")}
    if len(sizes) != 1:
        raise InputError(f"rotary embedding {_class(rotary)} has tables of sizes {sorted(sizes)}")
    return int(sizes.pop())


def _read_mlp(mlp: Any, config: Any) -> dict[str, Any]:
    if _class(mlp) in _EXPERT_BLOCKS:
        return _read_experts(mlp, config)
    if _class(mlp) in _GATED_MLPS:
        _expect_children(mlp, required={"gate_proj", "up_proj", "down_proj", "act_fn"})
        _expect_size("gate_proj", mlp.gate_proj.out_features, mlp.down_proj.in_features)
        fused, gated, activation = False, True, mlp.act_fn
    elif _class(mlp) == "Phi3MLP":
        _expect_children(mlp, required={"gate_up_proj", "down_proj", "activation_fn"})
        _expect_size("gate_up_proj", mlp.gate_up_proj.out_features, 2 * mlp.down_proj.in_features)
        fused, gated, activation = True, True, mlp.activation_fn
    elif _class(mlp) == "NemotronMLP":
        _expect_children(mlp, required={"up_proj", "down_proj", "act_fn"})
        fused, gated, activation = False, False, mlp.act_fn
    else:
        raise InputError(f"MLP {_class(mlp)} is not understood")
    _expect_class(mlp.down_proj, "Linear")
    return {
        "intermediate_size": mlp.down_proj.in_features,
        "activation": _activation(activation, config),
        "fused_gate_up": fused,
        "gated_mlp": gated,
    }


def _read_experts(block: Any, config: Any) -> dict[str, Any]:
    """Mixtral and Qwen3-MoE: a router (a bare weight) and experts held in two 3-D tensors."""
    _expect_children(block, required={"gate", "experts"})
    if getattr(block, "jitter_noise", 0):
        raise InputError("router_jitter_noise is not understood")
    if config.output_router_logits:
        raise InputError("output_router_logits (the load-balancing loss) is not understood")
    experts = block.experts
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    count, hidden, size = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    if shapes != {"gate_up_proj": (count, 2 * size, hidden), "down_proj": (count, hidden, size)}:
        raise InputError(f"expert tensors of {_class(experts)} are not understood: {shapes}")
    return {
        "intermediate_size": 0,
        "activation": _activation(experts.act_fn, config),
        "experts": count,
        "experts_per_token": block.gate.top_k,
        # The others cast what the softmax gives to the dtype of what they read.
        "fp32_routing": _class(block.gate) == "MixtralTopKRouter",
        "expert_intermediate_size": size,
    }


def _activation(module: Any, config: Any) -> str:
    """Name of the activation in the config, checked against the module that was built."""
    from transformers.activations import ACT2FN

    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if type(ACT2FN[name]) is not type(module):
        raise InputError(f"the MLP runs {_class(module)}, but the config says {name}")
    return str(name)


def _expect_children(module: Any, *, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    children = {name for name, _ in module.named_children()}
    unknown, missing = children - set(required) - set(optional), set(required) - children
    if unknown or missing:
        what = f"unknown {', '.join(sorted(unknown))}" if unknown else f"no {', '.join(sorted(missing))}"
        raise InputError(f"{_class(module)} is not as expected: {what}")


def _expect_class(module: Any, name: str) -> None:
    if _class(module) != name:
        raise InputError(f"expected {name}, found {_class(module)}, which is not understood")


def _expect_size(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(f"{name} has size {found:,} where {expected:,} was expected")


def _class(module: Any) -> str:
    return type(module).__name__
