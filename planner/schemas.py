"""Every JSON that commands print and files hold, as types; `vramwise schema NAME` prints the schema of one.

Where an output is a frozen type's own fields, that type stands here; where it is put together, its shape is
declared below, and tests hold what commands print to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from planner.answers.plan import PLAN_VERSION, Plan
from planner.base.json_schema import schema_of
from planner.base.values import dataclass
from planner.calibration.records import RECORD_SCHEMA_VERSION, RunRecord
from planner.planning.comparison import LongestLength, Row, SmallestCard
from planner.planning.estimation import ESTIMATE_VERSION
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateBasis:
    """What an estimate's figures rest on: planner's Basis, and the speed's in words (null without speed)."""

    coefficients: str
    record_count: int
    stack_versions: dict[str, str]
    reserve: str
    measured: bool
    notes: tuple[str, ...]
    speed: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateLine:
    """A setup with its figures: a line of `vramwise estimate --json`. Bytes are of one GPU.

    `components` sum to `process_bytes`, `phases` are each phase's process bytes; `tokens_per_second` is of
    all processes together, null where no forecast is possible.
    """

    version: Literal[1]
    setup: TrainingSetup
    weights_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    process_upper_bytes: int
    components: dict[str, int]
    phases: dict[str, int]
    tokens_per_second: float | None
    fits: bool
    basis: EstimateBasis


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateError:
    """Why the line of that number could not be answered."""

    error: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadConfig:
    """A trainer's file as read: planner/trainers/config.py."""

    trainer: str
    stack: str
    setup: TrainingSetup
    num_train_epochs: float | None
    learning_rate: float | None
    used: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigChange:
    """Settings to change together, in the trainer's words, with those before them."""

    settings: dict[str, Any]
    peak_upper_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigEstimate:
    """What a trainer's config needs: `vramwise estimate --config --json`."""

    version: Literal[1]
    path: str
    trainer_version: str
    gpu: str
    usable_bytes: int
    config: ReadConfig
    estimate: EstimateLine
    changes: tuple[ConfigChange, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareRows:
    """Several models and GPUs: `vramwise compare --model ... --gpu ... --json`."""

    version: Literal[1]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareCards:
    """The smallest cards for a model: `vramwise compare --model ... --json`."""

    version: Literal[1]
    smallest_cards: tuple[SmallestCard, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareModels:
    """The largest models for a card: `vramwise compare --gpu ... --json`."""

    version: Literal[1]
    models: tuple[LongestLength, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedFigure:
    """A stated figure (`low` to `high`) with its verdict, and the true one in the same unit."""

    kind: Literal["memory", "weights", "tokens_per_second", "hours", "card"]
    written: str
    low: float
    high: float
    unit: str
    verdict: Literal["possible", "tight", "beyond the card"]
    reason: str
    expected: float | None
    expected_low: float | None
    expected_high: float | None
    limit: float | None
    setup: TrainingSetup | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedClaim:
    """A claim with all its figures judged; `gpu_stated` says whether it names the card."""

    text: str
    model: str
    gpu: str
    gpu_stated: bool
    knobs: dict[str, str | int | float | bool | tuple[str, ...] | tuple[int, ...] | None]
    tokens: float | None
    unread: tuple[str, ...]
    figures: tuple[CheckedFigure, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Judged claims: `vramwise check --json`."""

    version: Literal[1]
    claims: tuple[CheckedClaim, ...]


OUTPUTS: Mapping[str, tuple[Any, int]] = MappingProxyType(
    {
        "plan": (Plan, PLAN_VERSION),
        "estimate": (EstimateLine | EstimateError | ConfigEstimate, ESTIMATE_VERSION),
        "compare": (CompareRows | CompareCards | CompareModels, 1),
        "check": (Checked, 1),
        "record": (RunRecord, RECORD_SCHEMA_VERSION),
    }
)
"""Each output's type and version by the command that prints it; `record` is a measured run's."""


def schema(name: str, *, closed: bool = False) -> dict[str, Any]:
    """The JSON Schema of an output; `closed` as schema_of has it."""
    kind, version = OUTPUTS[name]
    found = schema_of(kind, name=name, version=version, more=_more, closed=closed)
    if name == "plan":
        # Beside the fields of Plan: planner/answers/plan.py, to_dict.
        head = {"version": {"const": version}, "headroom_bytes": {"type": "integer"}}
        found["properties"] = {**head, **found["properties"]}
        found["required"] = [*head, *found["required"]]
    return found


def _more(kind: type) -> Mapping[str, Mapping[str, Any]]:
    """Of a setup's keys what their rows say."""
    said: dict[type, Callable[[], dict[str, dict[str, Any]]]] = {TrainingSetup: _of_knobs}
    return said[kind]() if kind in said else {}


def _of_knobs() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for knob in KNOBS:
        more: dict[str, Any] = {"description": knob.help}
        if knob.kind == "choice":
            more["enum"] = [*knob.choices, None] if knob.null else list(knob.choices)
        if knob.bounds is not None:
            more["minimum"], more["maximum"] = knob.bounds
        found[knob.name] = more
    return found
