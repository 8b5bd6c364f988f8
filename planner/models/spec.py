"""ModelSpec: a model as the memory and throughput models see it.

A spec is a table of parameters (name pattern, module class, shape, how often) plus one recipe per kind of
decoder layer. Shipped specs lie in profiles/models, written by `vramwise models inspect` from the
transformers model on the meta device; nothing in them is derived from a few headline numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, fields, replace
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.lazy import cached_fact
from planner.base.values import dataclass
from planner.models.checkpoint import Checkpoint
from planner.models.parameter import Parameter
from planner.models.tower import Tower
from planner.models.traced import TracedBlock

NORM_KINDS = ("rms", "rms_fp32_weight", "layernorm", "layernorm_no_weight")
QK_NORM_KINDS = ("none", "head", "full")
SCHEMA_VERSION = 1
FEW_HAVE = (
    *("traced", "traced_norm", "checkpoint", "kept", "tower"),
    *("value_head_dim", "attention_sinks", "fp32_routing", "loops"),
)
"""Fields that JSON leaves out where there is nothing to say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One kind of decoder layer: what its forward pass does, as far as memory and work depend on it.

    `indices` are the positions of these layers in the model. `norm` is the kind of its norms: "rms" casts
    the input to fp32 and back before the weight, "rms_fp32_weight" multiplies by the weight in fp32 and
    casts the product back (Gemma, OLMo 2), "layernorm" is torch's. `input_norms` says whether attention and
    MLP read normed inputs (pre-norm), `output_norms` whether their outputs are normed before the residual
    addition. `qk_norm` is "head" when queries and keys are normed per head, "full" when normed before the
    split into heads. `experts` is 0 for a dense MLP. `activation` is transformers' hidden_act.
    `rotary_dim` is how much of each head the rotation turns (null: all of it); `rotary_concatenated` says
    that queries and keys are put together again by torch.cat, one more copy of each (Phi-3, Nemotron).
    `attention_dropout` is the probability that the model's config sets. `value_head_dim` is the width of a
    head's values where they are not as wide as its keys (MLA), `attention_sinks` says that each head has a
    score beside those of tokens (gpt-oss), which eager and flex attention alone compute. `fp32_routing`
    says that what experts return is weighted in fp32 (Mixtral). `traced` is what was
    recorded of a layer that no recipe describes: the fields on norms, projections, MLP and rotation say
    nothing then, and heads are 0 where it has no attention. `kept` names linear layers that a checkpoint has
    in 16 bits here.
    """

    indices: tuple[int, ...]
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    norm: str = "rms"
    input_norms: bool = True
    output_norms: bool = False
    qk_norm: str = "none"
    fused_qkv: bool = False
    fused_gate_up: bool = False
    gated_mlp: bool = True
    rotary: bool = True
    sliding_window: int | None = None
    attention_softcap: bool = False
    residual_multiplier: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    rotary_dim: int | None = None
    rotary_concatenated: bool = False
    attention_dropout: float = 0.0
    value_head_dim: int | None = None
    attention_sinks: bool = False
    fp32_routing: bool = False
    traced: TracedBlock | None = None
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.indices:
            raise FieldError("layer indices", self.indices, "at least one")
        validate.integer("hidden_size", self.hidden_size, minimum=1, maximum=2**24)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            fewest = 1 if self.traced is None else 0
            validate.integer(name, getattr(self, name), minimum=fewest, maximum=2**24)
        for name in (
            "intermediate_size",
            "experts",
            "experts_per_token",
            "expert_intermediate_size",
            "shared_expert_intermediate_size",
        ):
            validate.integer(name, getattr(self, name), minimum=0, maximum=2**24)
        if self.rotary_dim is not None:
            validate.integer("rotary_dim", self.rotary_dim, minimum=1, maximum=self.head_dim)
        if self.value_head_dim is not None:
            validate.integer("value_head_dim", self.value_head_dim, minimum=1, maximum=2**24)
        validate.number("attention_dropout", self.attention_dropout, minimum=0.0, maximum=1.0)
        validate.choice("norm", self.norm, NORM_KINDS)
        validate.choice("qk_norm", self.qk_norm, QK_NORM_KINDS)
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise FieldError(
                "num_key_value_heads", self.num_key_value_heads, f"a divisor of {self.num_attention_heads}"
            )

    @property
    def attends(self) -> bool:
        """Whether it has attention (a layer of a hybrid may have none)."""
        return self.num_attention_heads > 0

    @property
    def count(self) -> int:
        """How many layers are of this kind."""
        return len(self.indices)

    @property
    def normed_around(self) -> bool:
        """Whether attention and MLP have a norm before and one after them (Gemma 2 and 3)."""
        return self.input_norms and self.output_norms

    @property
    def query_size(self) -> int:
        """Width of all queries of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all keys of a token; of all values too, where they are as wide."""
        return self.num_key_value_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Width of all values of a token."""
        return self.num_key_value_heads * (self.value_head_dim or self.head_dim)

    @property
    def context_size(self) -> int:
        """Width of what attention returns of a token."""
        return self.num_attention_heads * (self.value_head_dim or self.head_dim)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's exact shapes.

    `id` is what people type, `hub_id` where its weights are, `architecture` transformers' class,
    `default_attn_implementation` what transformers picks for it, `embedding_multiplier` whether the
    embedding output is scaled (a second tensor), `final_logit_softcapping` and `logit_scale` what the
    head applies. `rotary_tables` counts the cos/sin pairs of a forward pass (Gemma 3: one per attention
    type). `default_experts_implementation` is how transformers runs the experts of an MoE layer by
    default ("grouped_mm", "batched_mm" or "eager"; null for dense models). `download_bytes` is the size
    of the weights as published. `source` says how the spec was made (command and library versions).
    `traced_norm` is what was recorded of the norm after the last layer, where that of the layers is `traced`.
    `checkpoint` says how the weights are stored where they are quantised already, `tower` what looks at
    images where the model is described with it.
    """

    id: str
    hub_id: str
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    parameters: tuple[Parameter, ...]
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool
    default_attn_implementation: str
    source: str
    aliases: tuple[str, ...] = ()
    final_norm: str = "rms"
    embedding_multiplier: bool = False
    final_logit_softcapping: bool = False
    logit_scale: bool = False
    rotary_tables: int = 1
    default_experts_implementation: str | None = None
    download_bytes: int | None = None
    traced_norm: TracedBlock | None = None
    checkpoint: Checkpoint | None = None
    tower: Tower | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        validate.text("id", self.id)
        validate.integer("vocab_size", self.vocab_size, minimum=1, maximum=2**28)
        validate.integer("hidden_size", self.hidden_size, minimum=1, maximum=2**24)
        if self.schema_version != SCHEMA_VERSION:
            raise FieldError("schema_version", self.schema_version, str(SCHEMA_VERSION))
        positions = sorted(index for layer in self.layers for index in layer.indices)
        if positions != list(range(len(positions))) or not positions:
            raise InputError(f"{self.id}: the layer recipes do not cover the decoder layers once each")

    def __hash__(self) -> int:
        return self._digest

    @cached_fact
    def _digest(self) -> int:
        """Of all fields, made once: a spec is the key of most of what is remembered. What has the same digest
        is compared field by field.
        """
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    @cached_fact
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return sum(layer.count for layer in self.layers)

    @cached_fact
    def parameter_count(self) -> int:
        """All parameters, tied ones once: the published total."""
        own = sum(p.elements * p.count for p in self.parameters if not p.tied)
        return own if self.tower is None else own + self.tower.parameter_count

    @cached_fact
    def has_biased_linear(self) -> bool:
        """Whether the decoder layers have a Linear with a bias, which torch computes by cuBLASLt."""
        return bool(self.biased_linears)

    @cached_fact
    def biased_linears(self) -> tuple[str, ...]:
        """Module names of the decoder layers' Linears that have a bias."""
        found = (p for p in self.parameters if p.module_class == "Linear" and p.kind == "bias")
        return tuple(sorted({p.module_name for p in found if p.in_decoder_layer}))

    @cached_fact
    def scales_embeddings_outside(self) -> bool:
        """Whether the embeddings' output is scaled outside the embedding's own module."""
        return self.embedding_multiplier and not any("Scaled" in p.module_class for p in self.parameters)

    @cached_fact
    def is_traced(self) -> bool:
        """Whether layers were recorded rather than read."""
        return any(layer.traced is not None for layer in self.layers)

    @cached_fact
    def unseen_kernels(self) -> tuple[str, ...]:
        """What a trace could not see of its layers: functions that a GPU may have a fused kernel for."""
        return tuple(sorted({name for one in self.layers if one.traced for name in one.traced.unseen}))

    @cached_fact
    def rotary_features(self) -> int:
        """Features of a head that a row of a rotary table has values for; 0 without attention."""
        layer = next((one for one in self.layers if one.attends), self.layers[0])
        return layer.rotary_dim or layer.head_dim

    @cached_fact
    def norm_layer(self) -> LayerSpec:
        """The layer whose norm is the one after the last layer."""
        last = self.layers[-1]
        return last if self.traced_norm is None else replace(last, traced=self.traced_norm)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; fields that few layers have, and what was traced, kept or quantised, are left out where
        there is nothing.
        """
        values = asdict(self)
        traced = [one["traced"] for one in (*values["layers"], {"traced": values["traced_norm"]})]
        tower = values["tower"] or {"parameters": ()}
        listed = (*values["parameters"], *tower["parameters"])
        for part in (values, *values["layers"], *listed, *filter(None, traced)):
            for name in FEW_HAVE:
                if name in part and not part[name]:
                    del part[name]
        for part in (values, *values["layers"]):
            for block in (part.get("traced"), part.get("traced_norm")):
                for way in () if block is None else block["ways"]:
                    if not way["kernel"]:
                        del way["kernel"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Read the JSON form.

        Raises:
            InputError: the JSON does not describe a model.
        """
        try:
            own = ("parameters", "layers", "aliases", "traced_norm", "checkpoint", "tower")
            rest = {k: v for k, v in values.items() if k not in own}
            return cls(
                parameters=tuple(Parameter.from_dict(p) for p in values["parameters"]),
                layers=tuple(_layer(layer) for layer in values["layers"]),
                aliases=tuple(values.get("aliases", ())),
                traced_norm=_traced(values.get("traced_norm")),
                checkpoint=_checkpoint(values.get("checkpoint")),
                tower=None if values.get("tower") is None else Tower.from_dict(values["tower"]),
                **rest,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"not a model spec: {error}") from error


def _layer(values: Mapping[str, Any]) -> LayerSpec:
    own = {
        "indices": tuple(values["indices"]),
        "traced": _traced(values.get("traced")),
        "kept": tuple(values.get("kept", ())),
    }
    return LayerSpec(**{**values, **own})


def _traced(values: Mapping[str, Any] | None) -> TracedBlock | None:
    return None if values is None else TracedBlock.from_dict(values)


def _checkpoint(values: Mapping[str, Any] | None) -> Checkpoint | None:
    if values is None:
        return None
    kept = values["kept"]
    return Checkpoint(**{**values, "kept": None if kept is None else tuple(kept)})
