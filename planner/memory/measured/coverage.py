"""What the measured runs behind a calibration cover, and what of a setup lies outside them.

A setup is described by values, one a knob ("kernels", "liger"), by how knobs that change what a step asks for
come together, and by sizes. What no run had is named, and widens the interval
(planner/calibration/margins.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import combinations
from operator import attrgetter
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.models.spec import ModelSpec
from planner.setup.knob import Knob, plain
from planner.setup.knobs import KNOBS
from planner.setup.run import MAX_KNOWN, RunKind, TrainingRun

Trait = tuple[str, str]
PADDED = "padded batches"
"""What batches are, beside the knobs."""


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
        missing = _missing(self.values, self.pairs, run_traits(run), model_traits(run.model))
        return (*missing, *self._beyond(run))

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


@lru_cache(maxsize=4096)
def _missing(
    values: frozenset[Trait],
    pairs: frozenset[tuple[str, str]],
    own: frozenset[Trait],
    layout: frozenset[Trait],
) -> tuple[str, ...]:
    """Which of a run's own traits and of its model's layout, and which two together, are not among the
    measured.
    """
    missing = own - values
    found = [f"no run with {knob}={value} among the records" for knob, value in sorted(missing)]
    found += [
        f"no run of a model with {knob}={value} among the records" for knob, value in sorted(layout - values)
    ]
    together = [
        f"{first} and {second}" for first, second in _pairs(own - missing) if (first, second) not in pairs
    ]
    if together:
        found.append(f"no run with {', or with '.join(together)} together among the records")
    return tuple(found)


def run_traits(run: TrainingRun) -> frozenset[Trait]:
    """A run's traits by its knobs, those that its method does not use left out."""
    # Of sizes accumulation alone is counted.
    key = run.kind, run.setup.gradient_accumulation_steps
    known = _traits.get(key)
    if known is None:
        if len(_traits) >= MAX_KNOWN:
            _traits.clear()
        found = _count(run)
        known = _traits[key] = frozenset((*found, (PADDED, "true"))) if run.padded else frozenset(found)
    return known


_traits: dict[tuple[RunKind, int], frozenset[Trait]] = {}


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
        if layer.traced is not None:
            found |= {("traced", "true"), *(("an untraced kernel", what) for what in layer.traced.unseen)}
            continue
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


def _checkpointed(run: TrainingRun) -> str:
    setup = run.setup
    if not setup.gradient_checkpointing or setup.checkpointed_layers == 0:
        return "no layer"
    every = (None, run.model.num_hidden_layers)
    return "all layers" if setup.checkpointed_layers in every else "some layers"


_AS_RUN: dict[str, Callable[[TrainingRun], str]] = {
    "attn_implementation": lambda run: run.attention,
    "gradient_checkpointing": _checkpointed,
}


def knob_counter(knobs: tuple[Knob, ...]) -> Callable[[TrainingRun], list[Trait]]:
    """What gives a run's traits by the knobs that count, made once and called for every run."""
    counted = [(knob, knob.counted) for knob in knobs if knob.counted is not None]
    values_of = attrgetter("method", *(knob.name for knob, _ in counted))
    rows = tuple(
        (
            knob,
            _AS_RUN[knob.name] if how.as_run else None,
            (knob.name, plain(knob.default)) if how.default else None,
            (knob.name, how.others) if how.others else None,
        )
        for knob, how in counted
    )

    def count(run: TrainingRun) -> list[Trait]:
        method, *values = values_of(run.setup)
        found = []
        for (knob, as_run, usual, other), value in zip(rows, values, strict=True):
            if method not in knob.methods:
                continue
            if as_run is not None:
                found.append((knob.name, as_run(run)))
            elif value != knob.default:
                found.append(other or (knob.name, plain(value)))
            elif usual is not None:
                found.append(usual)
        return found

    return count


def together(knobs: tuple[Knob, ...]) -> frozenset[str]:
    """Names of knobs any two of which have to be measured together where they are not as usual."""
    return frozenset(knob.name for knob in knobs if knob.counted is not None and knob.counted.together)


_count = knob_counter(KNOBS)
_TOGETHER = together(KNOBS) | {PADDED}
_USUAL = frozenset(
    (knob.name, knob.counted.usual or plain(knob.default)) for knob in KNOBS if knob.counted is not None
)


def _pairs(values: frozenset[Trait]) -> Iterator[tuple[str, str]]:
    unusual = sorted(
        f"{knob}={value}" for knob, value in values if knob in _TOGETHER and (knob, value) not in _USUAL
    )
    return combinations(unusual, 2)


def _word(flag: bool) -> str:
    return "true" if flag else "false"
