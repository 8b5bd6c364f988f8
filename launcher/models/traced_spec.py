"""A model that no recipe describes, by tracing it: ModelSpec with what was recorded of its layers."""

from __future__ import annotations

from typing import Any

from launcher.models.inspect import read_parameters, source
from launcher.models.tracing.model import ModelTracer, TracedKind
from planner.base.errors import InputError
from planner.models.catalog import nearest_models
from planner.models.spec import LayerSpec, ModelSpec


def describe_traced(
    model: Any, *, model_id: str, hub_id: str, aliases: tuple[str, ...], note: str
) -> ModelSpec:
    """Describe a causal language model on the meta device, which is of no other use afterwards.

    Raises:
        InputError: it is built otherwise than of embeddings, layers, a norm and a head, or does something
            that a trace cannot describe.
    """
    architecture, config = type(model).__name__, model.config
    attention = config._attn_implementation
    try:
        tracer = ModelTracer(model)
        parameters = read_parameters(model, layers=tracer.parts.layers_path)
        head = tracer.parts.head
        found = tracer.trace()
        layers = tuple(
            _layer(kind, hidden_size=head.in_features, features=found.table_features) for kind in found.kinds
        )
    except InputError as error:
        raise InputError(
            f"{hub_id}: {architecture} has no recipe, and cannot be traced: {error}{nearest_models(hub_id)}"
        ) from error
    return ModelSpec(
        id=model_id,
        hub_id=hub_id,
        architecture=architecture,
        model_type=config.model_type,
        vocab_size=head.out_features,
        hidden_size=head.in_features,
        max_position_embeddings=config.max_position_embeddings,
        parameters=parameters,
        layers=layers,
        tied_embeddings=any(p.tied for p in parameters),
        default_attn_implementation=attention,
        source=source("; ".join(filter(None, ("traced", note)))),
        aliases=aliases,
        final_norm="traced",
        embedding_multiplier=found.scaled,
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None) is not None,
        logit_scale=hasattr(config, "logits_scaling"),
        rotary_tables=found.tables,
        default_experts_implementation=(
            # Experts that all run on all tokens (Llama 4's) are products like any other.
            config._experts_implementation
            if any(layer.experts > layer.experts_per_token for layer in layers)
            else None
        ),
        download_bytes=2 * sum(p.elements * p.count for p in parameters if not p.tied),
        traced_norm=found.norm,
    )


def _layer(kind: TracedKind, *, hidden_size: int, features: int) -> LayerSpec:
    attention = kind.attention
    shape: dict[str, Any] = {"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": 0}
    if attention is not None:
        shape = {
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.key_value_heads,
            "head_dim": attention.head_dim,
            "rotary_dim": features if 0 < features < attention.head_dim else None,
            "sliding_window": attention.window,
            "attention_softcap": attention.softcap,
            "rotary_concatenated": attention.queries_by_heads,
            "value_head_dim": attention.value_dim if attention.value_dim != attention.head_dim else None,
            "attention_sinks": attention.sinks,
        }
    experts = kind.experts
    if experts is not None:
        shape |= {
            "experts": experts.experts,
            "experts_per_token": experts.per_token,
            "expert_intermediate_size": experts.intermediate_size,
        }
    return LayerSpec(
        indices=kind.indices,
        hidden_size=hidden_size,
        intermediate_size=0,
        activation="traced",
        rotary=features > 0,
        traced=kind.block,
        **shape,
    )
