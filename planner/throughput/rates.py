"""Rates: how fast one GPU and its host do each kind of work, fitted to measured runs.

Shipped rates lie in profiles/calibration/throughput, a person's own in the user data folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

from planner.base import validate
from planner.base.data_files import PROFILES, read_json, user_data_dir
from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.throughput.by_kind import ByKind
from planner.throughput.microbenchmarks import (
    Microbenchmarks,
    Slowdown,
    microbenchmarks_of,
    slowdown,
)
from planner.throughput.scaling import published_slowdown
from planner.throughput.work import StepWork
from planner.throughput.work_kinds import SCALES, WORK_KINDS, Scale, Side, WorkKind

OVERLAP = 4.0
"""Power of the mean that joins GPU and host time: above the larger of two equal ones by 2^(1/4), 19%."""
NOT_HIDDEN = 0.35
"""Share of copies to the host, or of the GPU's work where that is less, that is not hidden behind the other:
of runs with activation_offloading, layers compiled (20261122-0cd48f03f4be, 20261122-18ef6e408250) and not."""
UNCALIBRATED = (0.65, 1.5)
"""Interval of a forecast with another GPU's rates, as factors of it; runs beside it: docs/throughput.md."""


def _positions(side: Side) -> tuple[int, ...]:
    """Where a side's kinds stand in the table, in the order that their seconds are added up in.

    What weights multiply comes first, then attention, then adapters (the order of SCALES): another order
    changes a sum's last digit, and with it what plans and records say to the last digit.
    """
    rows = [(at, kind) for at, kind in enumerate(WORK_KINDS) if kind.side == side]
    if side == "matrix":
        rows.sort(key=lambda row: SCALES.index(row[1].scales_with))
    return tuple(at for at, _ in rows)


_MATRIX, _TRAFFIC = _positions("matrix"), _positions("traffic")
_COPIES, _HOST = _positions("copies"), _positions("host")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds for each unit of work on one GPU (`gpu`, its catalog id) and its host, by kind (work_kinds.py).

    Between `low` and `high` times the forecast lie nine in ten runs of models that the fit had not seen,
    where the GPU decides; `launch_low` and `launch_high` where the host does. `record_ids` are the runs
    behind it. The host's rates are those of one that takes `host_block_seconds` for the eager block of
    microbenchmarks (null: not known).
    """

    gpu: str
    seconds: ByKind
    low: float
    high: float
    launch_low: float
    launch_high: float
    record_ids: tuple[str, ...]
    host_block_seconds: float | None = None

    def __post_init__(self) -> None:
        validate.text("rates gpu", self.gpu)
        for kind, value in zip(WORK_KINDS, self.seconds.numbers, strict=True):
            validate.number(kind.rate, value, minimum=0.0, maximum=10.0)
        if self.host_block_seconds is not None:
            validate.number("host_block_seconds", self.host_block_seconds, minimum=0.0, maximum=10.0)
        for name in ("low", "launch_low"):
            validate.number(name, getattr(self, name), minimum=0.0, maximum=1.0)
        for name in ("high", "launch_high"):
            validate.number(name, getattr(self, name), minimum=1.0, maximum=100.0)

    def interval(self, bound_by: str) -> tuple[float, float]:
        """Factors on a forecast that waits for "compute", "bandwidth" or "launches"."""
        return (self.launch_low, self.launch_high) if bound_by == "launches" else (self.low, self.high)

    def gpu_seconds(self, work: ByKind) -> tuple[float, float]:
        """GPU time: matrix work, and memory traffic."""
        return self._of(_MATRIX, work), self._of(_TRAFFIC, work)

    def copy_seconds(self, work: ByKind) -> float:
        """Time of copies between the GPU and its host."""
        return self._of(_COPIES, work)

    def host_seconds(self, work: ByKind) -> float:
        """Host time."""
        return self._of(_HOST, work)

    def optimizer_seconds(self, work: StepWork, *, host_slower: float = 1.0) -> float:
        """Time of an optimizer step: the GPU works on one tensor while the host launches the next one's."""
        computed, moved = self.gpu_seconds(work.optimizer_step)
        launched = self.host_seconds(work.optimizer_step) * host_slower
        return overlapped(computed + moved, launched)

    def _of(self, positions: tuple[int, ...], work: ByKind) -> float:
        amounts, seconds = work.numbers, self.seconds.numbers
        total = 0.0
        for at in positions:
            total += amounts[at] * seconds[at]
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON form: a field for each rate where `seconds` stands."""
        found: dict[str, Any] = {}
        for field in fields(self):
            if field.name == "seconds":
                found |= {kind.rate: self.seconds[kind.name] for kind in WORK_KINDS}
            else:
                found[field.name] = getattr(self, field.name)
        return found

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        """Read the JSON form; a kind of work that was told apart later than the file has the rate that both
        had (WorkKind.once_in), one that was not counted then takes no time (WorkKind.came_later).

        Raises:
            InputError: the JSON is not a set of rates.
        """
        try:
            seconds = {kind.name: _rate_in(values, kind) for kind in WORK_KINDS}
            rates = {kind.rate for kind in WORK_KINDS}
            rest = {name: value for name, value in values.items() if name not in rates}
            rest["record_ids"] = tuple(values["record_ids"])
            return cls(seconds=ByKind.of(seconds), **rest)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"not throughput rates: {error}") from error


def _rate_in(values: Mapping[str, Any], kind: WorkKind) -> Any:
    if kind.once_in is not None and kind.rate not in values:
        return values[f"{kind.once_in}_seconds"]
    if kind.came_later:
        return values.get(kind.rate, 0.0)
    return values[kind.rate]


def overlapped(gpu_seconds: float, host_seconds: float) -> float:
    """Time of a pass or an update: the larger of both, and more where alike ones wait for each other."""
    larger, smaller = max(gpu_seconds, host_seconds), min(gpu_seconds, host_seconds)
    if not larger:
        return 0.0
    return float(larger * (1.0 + (smaller / larger) ** OVERLAP) ** (1.0 / OVERLAP))


def beside_copies(gpu_seconds: Any, copy_seconds: Any) -> Any:
    """Time of the GPU's work and of copies to the host beside it, of floats or of arrays of them."""
    both, apart = gpu_seconds + copy_seconds, abs(gpu_seconds - copy_seconds)
    larger, smaller = (both + apart) / 2, (both - apart) / 2
    return larger + NOT_HIDDEN * smaller


class MicroStepTime(NamedTuple):
    """Seconds of a micro-step, and what most of it waits for: "compute", "bandwidth" or "launches"."""

    seconds: float
    bound_by: str


class PassSharing(NamedTuple):
    """What sharing the work with other GPUs adds to a pass, in seconds: copies on the GPU, transfers beside
    its work, and launches of the host's.
    """

    copies: float
    transfers: float
    launches: float


ALONE = PassSharing(0.0, 0.0, 0.0)
NOT_BEHIND_WORK = 0.1
"""Share of transfers between GPUs, or of the GPU's work where that is less, that is not hidden behind the
other: the first unit of a pass has nothing before it, and NCCL's kernels take processors and bandwidth."""


def micro_step_time(
    rates: Rates,
    work: StepWork,
    *,
    slower: float = 1.0,
    host_slower: float = 1.0,
    sharing: tuple[PassSharing, PassSharing] = (ALONE, ALONE),
) -> MicroStepTime:
    """Time of a micro-step; `slower` is a factor on matrix work, `host_slower` on the host's. `sharing` is
    what other GPUs add to the forward and to the backward pass.

    The host waits for the GPU between forward and backward: TRL reads the loss's token accuracy there
    (trl/trainer/sft_trainer.py:1643-1644).
    """
    seconds = rates.host_seconds(work.micro_step) * host_slower
    matrix = moved = host = 0.0
    for part, shared in zip((work.forward, work.backward), sharing, strict=True):
        computed, written = rates.gpu_seconds(part)
        computed *= slower
        copied = rates.copy_seconds(part)
        written += beside_copies(computed + written, copied) - (computed + written)
        launched = rates.host_seconds(part) * host_slower
        if shared is not ALONE:
            written += shared.copies
            written += _not_hidden(computed + written, shared.transfers)
            launched += shared.launches * host_slower
        seconds += overlapped(computed + written, launched)
        matrix, moved, host = matrix + computed, moved + written, host + launched
    if host >= matrix + moved:
        return MicroStepTime(seconds, "launches")
    return MicroStepTime(seconds, "compute" if matrix >= moved else "bandwidth")


def _not_hidden(gpu_seconds: float, transfers: float) -> float:
    """What transfers between GPUs beside its work add to the GPU's time."""
    larger, smaller = max(gpu_seconds, transfers), min(gpu_seconds, transfers)
    return larger + NOT_BEHIND_WORK * smaller - gpu_seconds


@lru_cache(maxsize=1)
def known_rates() -> tuple[Rates, ...]:
    """All rates on this machine, the user's own first.

    Raises:
        InputError: a file cannot be read.
    """
    found = []
    for folder in (user_data_dir(), PROFILES):
        for path in sorted((folder / "calibration" / "throughput").glob("*.json")):
            found.append(read_json(path, Rates.from_dict))
    return tuple(found)


def rates_for(gpu: GpuSpec) -> Rates | None:
    """The rates fitted on that GPU; None if there are none."""
    return next((rates for rates in known_rates() if rates.gpu == gpu.id), None)


def scaled_rates(gpu: GpuSpec, reference: GpuSpec, rates: Rates) -> Rates | None:
    """Rates of a GPU whose training nobody has measured: the reference's efficiencies at this one's rates.

    Each kind of work scales with what microbenchmarks of both GPUs reached; where one has none, as
    planner/throughput/scaling.py has it of published figures, the host taken to be alike. None where a rate
    is unknown.
    """
    factors = _scale_factors(gpu, reference, rates)
    if factors is None:
        return None
    block = rates.host_block_seconds
    return replace(
        rates,
        gpu=gpu.id,
        seconds=ByKind.of(
            {kind.name: rates.seconds[kind.name] * factors[kind.scales_with] for kind in WORK_KINDS}
        ),
        host_block_seconds=None if block is None else factors["launch"] * block,
    )


def _scale_factors(gpu: GpuSpec, reference: GpuSpec, rates: Rates) -> dict[Scale, float] | None:
    """How many times as long as on the reference each kind of work takes; None where that is unknown."""
    published = published_slowdown(gpu, reference)
    found = measured_slowdown(gpu, reference) or published
    matrix, traffic = found.matrix or published.matrix, found.elementwise or published.elementwise
    if matrix is None or traffic is None:
        return None
    launch = host_slower(microbenchmarks_of(gpu.id), rates) or found.launch or 1.0
    return {
        "matrix": matrix,
        "single": found.single or matrix,
        "attention": found.attention or matrix,
        "masked_attention": found.masked_attention or matrix,
        "adapter": found.adapter or matrix,
        "elementwise": traffic,
        "dequantized": found.dequantized or traffic,
        "host_copy": found.host_copy or 1.0,
        "launch": launch,
        "quantized_call": launch if rates.host_block_seconds else found.quantized_call or launch,
    }


def host_slower(measured: Microbenchmarks | None, rates: Rates) -> float | None:
    """How many times as long as the rates' host the measured one takes for the eager block of
    microbenchmarks; None where either is not known.
    """
    if measured is None or rates.host_block_seconds is None:
        return None
    return measured.eager_block_seconds / rates.host_block_seconds


def measured_slowdown(gpu: GpuSpec, reference: GpuSpec) -> Slowdown | None:
    """What microbenchmarks say of two GPUs; None where one has none."""
    mine = microbenchmarks_of(gpu.id)
    theirs = None if mine is None else microbenchmarks_of(reference.id)
    return None if mine is None or theirs is None else slowdown(mine, theirs)
