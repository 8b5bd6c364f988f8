"""What cannot be counted: CUDA context, cuBLAS workspaces, the allocator's reserve. Measured by environment.

Coefficients lie in profiles/calibration (shipped) or the user's data folder; `vramwise calibrate` fits them.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from planner.base import validate
from planner.base.errors import InputError
from planner.base.units import MIB
from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.memory.breakdown import FITTED, REPLAYED, Basis
from planner.memory.measured.context import ContextMemory, context_on
from planner.memory.measured.coverage import Coverage
from planner.memory.measured.cuda_terms import CUBLAS_HANDLES, workspace_block_bytes
from planner.models.spec import ModelSpec
from planner.setup.cuda_allocator import ALLOCATORS, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

UNKNOWN_REPLAY_MARGIN_BLOCKS = 1.5
UNKNOWN_REPLAY_MARGIN_BYTES = 128 * MIB
"""Interval of a replay where a calibration file does not give one: the worst of the shipped records' held-out
shortfalls is one block of the largest size."""
UNKNOWN_OUTSIDE_FACTOR = 2.0
"""How much the interval widens for something outside the records where a calibration file does not say: held
out, the shipped records that had something the others had not needed up to 1.9 of the others' interval."""
INTERVAL_KINDS = ("checkpointed", "kept", "compiled", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReserveTerms:
    """What the allocator's reserve grows with: `working` the busiest layer's own allocations, `head` the
    output head's, `kept` what forward keeps for backward, `weight` the largest dequantised weight,
    `optimizer` the optimizer step's temporaries, in bytes.
    """

    working_bytes: int
    head_bytes: int
    kept_bytes: int
    weight_bytes: int
    optimizer_bytes: int

    def as_tuple(self) -> tuple[int, int, int, int, int]:
        """In the order of Coefficients.reserve_per_byte."""
        return (
            self.working_bytes,
            self.head_bytes,
            self.kept_bytes,
            self.weight_bytes,
            self.optimizer_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """All terms together: the scale of what can go otherwise than expected."""
        return sum(self.as_tuple())


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """How far a setup lies from what was measured: what no run had, the factor by which the interval is wider
    for it, and bytes that another GPU than the measured one adds to it.
    """

    outside: tuple[str, ...]
    factor: float
    extra_bytes: int

    def widened(self, margin_bytes: int) -> int:
        """An interval's width with the distance in it."""
        return int(self.factor * margin_bytes) + self.extra_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class KindShares:
    """The interval's two shares for one kind of setup: of the reserve's terms, and of the largest block."""

    kind: str
    margin_fraction: float
    replay_margin_blocks: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """Measured terms of one environment.

    `context_bytes`: what the driver shows above reserved memory at the end of a step, without managed memory
    (context, kernels, libraries). `workspace_bytes`: what cuBLAS holds in torch's allocator. Reserved memory
    above allocated is `reserve_constant_bytes` plus `reserve_per_byte` times the ReserveTerms. The interval's
    upper end is the expected figure plus `margin_fraction` of the terms' sum plus `margin_bytes`; where the
    allocator is replayed, plus `replay_margin_blocks` times the largest block that a step asks for and
    `replay_margin_bytes`. Either covers every record when its model is left out of the fit. `kinds` are the
    two shares by kind of setup (`interval_kind`), the fields without a kind the worst of them. Everything
    outside `coverage` (null: unknown) adds `outside_factor` - 1 of that margin; another GPU than `gpu` adds
    at least `context_spread_bytes`, how far above `context_bytes` a run in a process of its own came.
    `allocator` is the one that the reserve's and the interval's runs had (files that do not say: torch's
    default).
    """

    name: str
    context_bytes: int
    workspace_bytes: int
    reserve_constant_bytes: int
    reserve_per_byte: tuple[float, ...]
    margin_fraction: float
    margin_bytes: int
    record_ids: tuple[str, ...]
    model_ids: tuple[str, ...]
    gpu: str
    stack_versions: tuple[tuple[str, str], ...]
    replay_margin_blocks: float = UNKNOWN_REPLAY_MARGIN_BLOCKS
    replay_margin_bytes: int = UNKNOWN_REPLAY_MARGIN_BYTES
    kinds: tuple[KindShares, ...] = ()
    outside_factor: float = UNKNOWN_OUTSIDE_FACTOR
    context_spread_bytes: int = UNKNOWN_REPLAY_MARGIN_BYTES
    coverage: Coverage | None = None
    allocator: str = NATIVE

    def __post_init__(self) -> None:
        validate.text("coefficients name", self.name)
        validate.choice("allocator", self.allocator, ALLOCATORS)
        for field in (
            "context_bytes",
            "workspace_bytes",
            "reserve_constant_bytes",
            "margin_bytes",
            "replay_margin_bytes",
            "context_spread_bytes",
        ):
            validate.integer(field, getattr(self, field), minimum=0, maximum=2**40)
        if len(self.reserve_per_byte) != len(fields(ReserveTerms)):
            raise InputError(f"reserve_per_byte needs {len(fields(ReserveTerms))} numbers")
        shares = [self.margin_fraction, self.replay_margin_blocks, self.outside_factor]
        for one in self.kinds:
            validate.choice("interval kind", one.kind, INTERVAL_KINDS)
            shares += [one.margin_fraction, one.replay_margin_blocks]
        for value in (*self.reserve_per_byte, *shares):
            validate.number("coefficient", value, minimum=0.0, maximum=10.0)

    def reserve_bytes(self, terms: ReserveTerms) -> int:
        """Reserved memory above allocated at the peak of a step."""
        reserve = sum(rate * size for rate, size in zip(self.reserve_per_byte, terms.as_tuple(), strict=True))
        return self.reserve_constant_bytes + int(reserve)

    def margin(self, terms: ReserveTerms, kind: str) -> int:
        """How far above the expected figure the interval of a kind of setup ends."""
        found = (one.margin_fraction for one in self.kinds if one.kind == kind)
        return int(next(found, self.margin_fraction) * terms.total_bytes) + self.margin_bytes

    def replay_margin(self, largest_block_bytes: int, kind: str) -> int:
        """The same where the allocator is replayed, from the largest block that a step asks for."""
        found = (one.replay_margin_blocks for one in self.kinds if one.kind == kind)
        return int(next(found, self.replay_margin_blocks) * largest_block_bytes) + self.replay_margin_bytes

    def distance(self, run: TrainingRun, gpu: GpuSpec | None) -> Distance:
        """How far a run lies from what was measured."""
        if self.coverage is None:
            outside: tuple[str, ...] = ("the calibration does not say what its records cover",)
        else:
            outside = self.coverage.outside(run)
        return Distance(
            outside=outside,
            factor=1.0 + len(outside) * max(0.0, self.outside_factor - 1.0),
            extra_bytes=self.context_on(gpu).spread_bytes,
        )

    def context_on(self, gpu: GpuSpec | None) -> ContextMemory:
        """The context on a card: as measured on `gpu` itself, elsewhere by the card's processors (unknown: as
        measured).
        """
        if gpu is not None and gpu.id == self.gpu:
            return ContextMemory(self.context_bytes, 0)
        scaled = None if gpu is None else self._scaled(gpu)
        return scaled or ContextMemory(self.context_bytes, self.context_spread_bytes)

    def _scaled(self, gpu: GpuSpec) -> ContextMemory | None:
        return context_on(gpu, self.gpu, self.context_bytes, self.context_spread_bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        covered = None if self.coverage is None else self.coverage.to_dict()
        return {**asdict(replace(self, coverage=None)), "coverage": covered}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Coefficients:
        """Read the JSON form; files written before the allocator was replayed get a wide replay margin, those
        that do not say what they cover are taken to cover nothing.

        Raises:
            InputError: the JSON is not a set of coefficients.
        """
        covered = values.get("coverage") if isinstance(values, dict) else None
        try:
            return cls(
                **{
                    **values,
                    "reserve_per_byte": tuple(values["reserve_per_byte"]),
                    "record_ids": tuple(values["record_ids"]),
                    "model_ids": tuple(values["model_ids"]),
                    "stack_versions": tuple((k, v) for k, v in values["stack_versions"]),
                    "kinds": tuple(KindShares(**one) for one in values.get("kinds", ())),
                    "coverage": None if covered is None else Coverage.from_dict(covered),
                }
            )
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"not calibration coefficients: {error}") from error


def interval_kind(setup: TrainingSetup) -> str:
    """What the interval goes by: "full" where all weights are trained, whose gradients and state leave holes
    of every size; of adapters, "compiled" where torch's inductor plans the buffers, "kept" where layers keep
    more than their inputs, or move them; else "checkpointed".
    """
    if not setup.uses_lora:
        return "full"
    if setup.compile != "none":
        return "compiled"
    whole = setup.gradient_checkpointing and setup.checkpointed_layers is None
    moved = setup.selective_checkpointing or setup.activation_offloading
    return "checkpointed" if whole and not moved else "kept"


def cublas_workspace_bytes(gpu: GpuSpec | None, measured: Coefficients) -> int:
    """Workspaces of both handles: as measured on this GPU, else torch's defaults (unknown: the larger)."""
    if gpu is not None and gpu.id == measured.gpu:
        return measured.workspace_bytes
    return CUBLAS_HANDLES * workspace_block_bytes(gpu)


def basis_of(
    coefficients: Coefficients,
    model: ModelSpec,
    gpu: GpuSpec | None,
    distance: Distance,
    *,
    replayed: bool,
    counted: tuple[str, ...] = (),
) -> Basis:
    """What an estimate rests on; `counted` are the stack's notes.

    A model that no run had does not widen the interval: the ordinary one is learned from models held out.
    """
    notes = []
    if gpu is None or gpu.id != coefficients.gpu:
        what = "context" if replayed else "context and reserve"
        notes.append(f"{what} measured on {coefficients.gpu}, not on this GPU")
    if model.id not in coefficients.model_ids:
        notes.append("no run of this model among the records")
    if distance.outside:
        notes += [*distance.outside, f"interval {distance.factor:.1f} times as wide for it"]
    notes += counted
    return Basis(
        coefficients=coefficients.name,
        record_count=len(coefficients.record_ids),
        stack_versions=coefficients.stack_versions,
        reserve=REPLAYED if replayed else FITTED,
        measured=not notes,
        notes=tuple(notes),
    )
