"""What the measured runs behind a calibration cover, and what of a setup lies outside them.

A setup is described by values, one a knob ("kernels", "liger"), by how knobs that change what a step asks for
come together, and by sizes. What no run had is named, and widens the interval
(planner/calibration/margins.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

from planner.base.errors import InputError
from planner.models.spec import ModelSpec
from planner.setup.run import TrainingRun
from planner.setup.training_setup import ALL_LINEAR, TrainingSetup

Trait = tuple[str, str]
_PLAIN = frozenset(
    {
        ("method", "qlora"),
        ("dtype", "bfloat16"),
        ("attn_implementation", "sdpa"),
        ("kernels", "none"),
        ("compile", "none"),
        ("gradient_checkpointing", "all layers"),
    }
)
_TOGETHER = (
    "method",
    "dtype",
    "attn_implementation",
    "kernels",
    "compile",
    "gradient_checkpointing",
    "use_dora",
    "prepare_for_kbit_training",
    "selective_checkpointing",
    "activation_offloading",
    "packing",
    "padded batches",
)
"""Knobs whose layers ask for other blocks: any two that are not as usual have to be measured together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What a set of measured runs had: values of knobs and of model layouts, two unusual knobs together, and
    the largest length, tokens of a micro-step, rank and parameter count.
    """

    values: frozenset[Trait]
    pairs: frozenset[tuple[str, str]]
    max_length: int
    max_tokens: int
    max_rank: int
    max_parameters: int

    def outside(self, run: TrainingRun) -> tuple[str, ...]:
        """What of a run no measured one had, each in a few plain words; empty where all was measured."""
        own, layout = run_traits(run), model_traits(run.model)
        missing = own - self.values
        found = [f"no run with {knob}={value} among the records" for knob, value in sorted(missing)]
        found += [
            f"no run of a model with {knob}={value} among the records"
            for knob, value in sorted(layout - self.values)
        ]
        together = [
            f"{first} and {second}"
            for first, second in _pairs(own - missing)
            if (first, second) not in self.pairs
        ]
        if together:
            found.append(f"no run with {', or with '.join(together)} together among the records")
        found += self._beyond(run)
        return tuple(found)

    def _beyond(self, run: TrainingRun) -> Iterator[str]:
        setup = run.setup
        rank = setup.lora_r if setup.uses_lora else 0
        for name, value, largest in (
            ("length", setup.max_length, self.max_length),
            ("tokens of a micro-step", run.micro_step.tokens, self.max_tokens),
            ("rank", rank, self.max_rank),
            ("parameters", run.model.parameter_count, self.max_parameters),
        ):
            if value > largest:
                yield f"{name} {value:,} beyond the largest measured, {largest:,}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form: values by knob."""
        by_knob: dict[str, list[str]] = {}
        for knob, value in sorted(self.values):
            by_knob.setdefault(knob, []).append(value)
        return {
            "values": by_knob,
            "pairs": [list(pair) for pair in sorted(self.pairs)],
            "max_length": self.max_length,
            "max_tokens": self.max_tokens,
            "max_rank": self.max_rank,
            "max_parameters": self.max_parameters,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Coverage:
        """Read the JSON form.

        Raises:
            InputError: the JSON does not describe a coverage.
        """
        try:
            sizes = {
                name: values[name] for name in ("max_length", "max_tokens", "max_rank", "max_parameters")
            }
            if not all(isinstance(size, int) for size in sizes.values()):
                raise InputError(f"not a coverage: {sizes}")
            return cls(
                values=frozenset(
                    (knob, value) for knob, found in values["values"].items() for value in found
                ),
                pairs=frozenset((first, second) for first, second in values["pairs"]),
                **sizes,
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"not a coverage: {error}") from error


def coverage_of(runs: Iterable[TrainingRun]) -> Coverage:
    """What measured runs cover."""
    values: set[Trait] = set()
    pairs: set[tuple[str, str]] = set()
    length = tokens = rank = parameters = 0
    for run in runs:
        setup, own = run.setup, run_traits(run)
        values |= own | model_traits(run.model)
        pairs.update(_pairs(own))
        length = max(length, setup.max_length)
        tokens = max(tokens, run.micro_step.tokens)
        rank = max(rank, setup.lora_r if setup.uses_lora else 0)
        parameters = max(parameters, run.model.parameter_count)
    return Coverage(
        values=frozenset(values),
        pairs=frozenset(pairs),
        max_length=length,
        max_tokens=tokens,
        max_rank=rank,
        max_parameters=parameters,
    )


def run_traits(run: TrainingRun) -> frozenset[Trait]:
    """A run's traits by its knobs, those that its method does not use left out."""
    setup = run.setup
    found = [
        ("method", setup.method),
        ("dtype", setup.dtype),
        ("optim", setup.optim),
        ("attn_implementation", run.attention),
        ("kernels", setup.kernels),
        ("compile", setup.compile),
        ("gradient_checkpointing", _checkpointed(setup, run.model)),
        ("gradient_accumulation_steps", "1" if setup.gradient_accumulation_steps == 1 else "several"),
    ]
    if setup.uses_lora:
        found.append(("lora_dropout", "0" if setup.lora_dropout == 0 else "above 0"))
        found.append(("target_modules", ALL_LINEAR if setup.target_modules == ALL_LINEAR else "a list"))
    if setup.method == "qlora":
        found.append(("bnb_4bit_quant_type", setup.bnb_4bit_quant_type))
        found.append(("bnb_4bit_use_double_quant", _word(setup.bnb_4bit_use_double_quant)))
    if setup.activation_memory_budget is not None:
        found.append(("activation_memory_budget", "set"))
    found += [
        (name, "true")
        for name, value in (
            ("use_dora", setup.use_dora),
            ("prepare_for_kbit_training", setup.prepare_for_kbit_training),
            ("selective_checkpointing", setup.selective_checkpointing),
            ("activation_offloading", setup.activation_offloading),
            ("packing", setup.packing),
            ("padded batches", run.padded),
        )
        if value
    ]
    return frozenset(found)


@lru_cache(maxsize=512)
def model_traits(model: ModelSpec) -> frozenset[Trait]:
    """A model's traits: the layouts of its layers that decide what a step asks for."""
    found = {
        ("tied_embeddings", _word(model.tied_embeddings)),
        ("embedding_multiplier", _word(model.embedding_multiplier)),
        ("final_logit_softcapping", _word(model.final_logit_softcapping)),
        ("rotary_tables", str(model.rotary_tables)),
    }
    for layer in model.layers:
        norms = "inputs and outputs" if layer.output_norms else "inputs"
        found |= {
            ("norm", layer.norm),
            ("normed", norms if layer.input_norms else "outputs"),
            ("qk_norm", layer.qk_norm),
            ("fused_qkv", _word(layer.fused_qkv)),
            ("fused_gate_up", _word(layer.fused_gate_up)),
            ("gated_mlp", _word(layer.gated_mlp)),
            ("rotary", _word(layer.rotary)),
            ("partial_rotary", _word(layer.rotary_dim not in (None, layer.head_dim))),
            ("sliding_window", _word(layer.sliding_window is not None)),
            ("attention_softcap", _word(layer.attention_softcap)),
            ("attention_dropout", _word(layer.attention_dropout > 0)),
            ("experts", _word(layer.experts > 0)),
        }
    return frozenset(found)


def _checkpointed(setup: TrainingSetup, model: ModelSpec) -> str:
    if not setup.gradient_checkpointing or setup.checkpointed_layers == 0:
        return "no layer"
    return "all layers" if setup.checkpointed_layers in (None, model.num_hidden_layers) else "some layers"


def _pairs(values: frozenset[Trait]) -> Iterator[tuple[str, str]]:
    unusual = sorted(
        f"{knob}={value}" for knob, value in values if knob in _TOGETHER and (knob, value) not in _PLAIN
    )
    return combinations(unusual, 2)


def _word(flag: bool) -> str:
    return "true" if flag else "false"
