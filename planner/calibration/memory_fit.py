"""Calibration: measured runs -> the coefficients of what cannot be counted, and what is left unexplained.

Held-out residuals decide the interval: every record is predicted from a fit without its model, and the
margin covers the worst of them (planner/calibration/margins.py).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from planner.base.errors import InputError
from planner.base.units import MIB
from planner.base.values import dataclass
from planner.calibration.margins import HeldOutThing, Shortfall, held_out_things, margin_share, outside_factor
from planner.calibration.records import RunRecord
from planner.calibration.reserve_fit import non_negative_fit
from planner.calibration.samples import Resolve, Sample, samples_of
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.memory.estimate import estimate_memory
from planner.memory.measured.coefficients import (
    INTERVAL_KINDS,
    Coefficients,
    KindShares,
    interval_kind,
)
from planner.memory.measured.coverage import coverage_of, model_traits, run_traits
from planner.memory.step.replay import replay_steps
from planner.setup.stack import TRL

MARGIN_BYTES = 256 * MIB
"""Constant part of the interval: about two of the allocator's larger cached blocks in the records."""
REPLAY_MARGIN_BYTES = 64 * MIB
"""The same where the allocator is replayed: a few segments of 20 MiB."""
MARGIN_SLACK = 0.02
"""Added to the worst held-out shortfall (a share of the terms): the next run is not among the records."""
REPLAY_MARGIN_SLACK = {"checkpointed": 0.1, "kept": 0.1, "compiled": 0.5, "full": 0.1}
"""The same where the allocator is replayed, in blocks of the largest size that a step asks for. More where
inductor plans buffers: of 94 runs that were new to the model of its day three, all of them compiled, lay
beyond their interval (20261122-114c6c992997, 20261122-f247692c1b93, 20261122-dcb3fce9cd53), before kernels
were replayed in the order of their traces.
"""
MIN_RECORDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """A record beside its prediction from a fit that has not seen its model, by one way of telling reserve.

    Errors are predicted / measured - 1; `process_error` is null where the driver's figure is not the run's
    own, or was not read.
    """

    record_id: str
    model: str
    allocated_error: float
    reserved_error: float
    process_error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Coefficients and the held-out residuals that their intervals rest on.

    `residuals` are those of the allocator's replay, `fitted_residuals` those of the fitted reserve. `things`
    are what the runs with one thing needed of the replay's interval learned without them.
    """

    coefficients: Coefficients
    residuals: tuple[Residual, ...]
    fitted_residuals: tuple[Residual, ...]
    things: tuple[HeldOutThing, ...]


def calibrate(
    records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve, *, name: str, allocator: str
) -> Calibration:
    """Fit the coefficients of one GPU with one of torch's allocators.

    The context is that of the GPU's own runs. Where a block comes to lie is torch's doing on any GPU: reserve
    and intervals rest on the allocator's runs on all of them.

    Raises:
        InputError: too few records of the GPU, or of the allocator.
    """
    by_gpu = _by_gpu(records, gpu, resolve)
    samples = _enough(by_gpu[gpu.id], gpu.id)
    measured = [sample for there in by_gpu.values() for sample in there]
    pool = _pool(by_gpu, allocator)
    residuals, shortfalls = _held_out(samples, pool, gpu, name)
    for other, there in by_gpu.items():
        if other != gpu.id:
            for replay, found in _held_out(there, pool, gpu_catalog().get(other), other)[1].items():
                shortfalls[replay] += found
    things = held_out_things(shortfalls[True], constant_bytes=REPLAY_MARGIN_BYTES, slack=REPLAY_MARGIN_SLACK)
    fitted = dataclasses.replace(
        _fit(samples, pool, gpu, name),
        coverage=coverage_of(sample.run for sample in measured),
        model_ids=tuple(sorted({sample.record.setup.model for sample in measured})),
    )
    return Calibration(
        coefficients=_with_margins(fitted, shortfalls, things),
        residuals=tuple(residuals[True]),
        fitted_residuals=tuple(residuals[False]),
        things=things,
    )


def held_out_residuals(
    records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve, *, allocator: str
) -> tuple[Residual, ...]:
    """Errors of every usable run of a GPU with an allocator by a fit without its model, that one replayed.

    Raises:
        InputError: too few records of it.
    """
    by_gpu = _by_gpu(records, gpu, resolve)
    samples = _enough(by_gpu[gpu.id], gpu.id)
    residuals, _ = _held_out(samples, _pool(by_gpu, allocator), gpu, gpu.id)
    return tuple(residuals[True])


def _pool(by_gpu: Mapping[str, Sequence[Sample]], allocator: str) -> list[Sample]:
    """An allocator's samples on all GPUs."""
    every = (sample for there in by_gpu.values() for sample in there)
    return _enough([sample for sample in every if sample.record.allocator == allocator], allocator)


def _enough(samples: list[Sample], what: str) -> list[Sample]:
    if len(samples) < MIN_RECORDS:
        raise InputError(
            f"{what}: {len(samples)} measured runs are too few to calibrate; {MIN_RECORDS} are needed"
        )
    return samples


def _by_gpu(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve) -> dict[str, list[Sample]]:
    """Samples of a GPU, and of the catalog's other ones that have enough."""
    there = {record.environment.gpu_id for record in records} - {gpu.id}
    others = ((one.id, samples_of(records, one, resolve)) for one in gpu_catalog() if one.id in there)
    return {gpu.id: samples_of(records, gpu, resolve)} | {
        other: samples for other, samples in others if len(samples) >= MIN_RECORDS
    }


def _held_out(
    samples: Sequence[Sample], pool: Sequence[Sample], gpu: GpuSpec, name: str
) -> tuple[dict[bool, list[Residual]], dict[bool, list[Shortfall]]]:
    """Residuals and shortfalls, with replay (true) and without, of a GPU's runs that are in the pool (of one
    allocator) by a fit without their model.
    """
    residuals: dict[bool, list[Residual]] = {True: [], False: []}
    shortfalls: dict[bool, list[Shortfall]] = {True: [], False: []}
    own = [sample for sample in pool if sample.record.environment.gpu_id == gpu.id]
    for held_out in sorted({sample.record.setup.model for sample in own}):
        rest, others = (
            left if len(left := _without(held_out, all_of)) >= MIN_RECORDS else all_of
            for all_of in (samples, pool)
        )
        fitted = _fit(rest, others, gpu, name)
        for sample in own:
            for replay in (True, False) if sample.record.setup.model == held_out else ():
                residual, shortfall = _residual(sample, fitted, gpu, replay=replay)
                residuals[replay].append(residual)
                shortfalls[replay].append(shortfall)
    return residuals, shortfalls


def _without(model: str, samples: Sequence[Sample]) -> Sequence[Sample]:
    return [sample for sample in samples if sample.record.setup.model != model]


def _with_margins(
    fitted: Coefficients, shortfalls: dict[bool, list[Shortfall]], things: Sequence[HeldOutThing]
) -> Coefficients:
    """Coefficients with the intervals that held-out shortfalls ask for, with and without replay."""
    kinds = tuple(
        KindShares(
            kind=kind,
            margin_fraction=_rounded(
                margin_share(shortfalls[False], kind=kind, constant_bytes=MARGIN_BYTES, slack=MARGIN_SLACK)
            ),
            replay_margin_blocks=_rounded(
                margin_share(
                    shortfalls[True],
                    kind=kind,
                    constant_bytes=REPLAY_MARGIN_BYTES,
                    slack=REPLAY_MARGIN_SLACK[kind],
                )
            ),
        )
        for kind in INTERVAL_KINDS
    )
    return dataclasses.replace(
        fitted,
        margin_fraction=max(one.margin_fraction for one in kinds),
        replay_margin_blocks=max(one.replay_margin_blocks for one in kinds),
        kinds=kinds,
        outside_factor=_rounded(outside_factor(things)),
    )


def _rounded(share: float) -> float:
    """To four digits, upwards."""
    return round(share + 5e-5, 4)


def _fit(samples: Sequence[Sample], pool: Sequence[Sample], gpu: GpuSpec, name: str) -> Coefficients:
    """Coefficients of a GPU from its own samples; the reserve's from the pool's, which have one allocator."""
    # At its cap an allocator gives cached blocks back.
    uncapped = [sample for sample in pool if not sample.met_cap] or pool
    constant, *slopes = non_negative_fit(
        [sample.terms for sample in uncapped],
        [sample.reserve_bytes for sample in uncapped],
        [sample.reserved_bytes for sample in uncapped],
    )
    contexts = [
        (own - sample.reserved_bytes - sample.beside_bytes, sample.record.isolated)
        for sample in samples
        if (own := sample.own_process_bytes) is not None
    ]
    if not contexts:
        raise InputError(f"{gpu.id}: no run had a process of its own, so the context cannot be told")
    context = int(statistics.median(beyond for beyond, _ in contexts))
    spread = max((beyond - context for beyond, alone in contexts if alone), default=0)
    latest = max(samples, key=lambda sample: sample.record.created).record
    return Coefficients(
        name=name,
        context_bytes=context,
        context_spread_bytes=max(0, spread),
        coverage=coverage_of(sample.run for sample in samples),
        workspace_bytes=max(0, int(statistics.median(sample.workspace_bytes for sample in samples))),
        reserve_constant_bytes=int(constant),
        reserve_per_byte=tuple(slopes),
        margin_fraction=0.0,
        margin_bytes=MARGIN_BYTES,
        replay_margin_blocks=0.0,
        replay_margin_bytes=REPLAY_MARGIN_BYTES,
        record_ids=tuple(sorted(sample.record.id for sample in samples)),
        model_ids=tuple(sorted({sample.record.setup.model for sample in samples})),
        gpu=gpu.id,
        allocator=pool[0].record.allocator,
        stack_versions=tuple(
            (package, version) for package, version in latest.environment.versions if package in TRL.packages
        ),
    )


def _residual(
    sample: Sample, fitted: Coefficients, gpu: GpuSpec, *, replay: bool
) -> tuple[Residual, Shortfall]:
    """Errors of a held-out record, and what it needed beyond its expected figure."""
    record, run, setup = sample.record, sample.run, sample.record.setup
    step = record.phase("step")
    if step is None:
        raise InputError(f"{record.id}: no step was measured")
    predicted = estimate_memory(run, gpu=gpu, coefficients=fitted, replay=replay, allocator=record.allocator)
    own = sample.own_process_bytes
    # The driver's figure moves by a chunk of managed memory: the reserve has to be covered by itself too.
    beyond = predicted.process_bytes - predicted.reserved_bytes
    measured = max(own or 0, step.reserved_bytes + beyond)
    residual = Residual(
        record_id=record.id,
        model=setup.model,
        allocated_error=predicted.allocated_bytes / step.allocated_bytes - 1,
        reserved_error=predicted.reserved_bytes / step.reserved_bytes - 1,
        process_error=None if own is None else predicted.process_bytes / own - 1,
    )
    scale = int(sum(sample.terms))
    if replay:
        scale = replay_steps(run, gpu=gpu, allocator=record.allocator).largest_block_bytes
    return residual, Shortfall(
        beyond_bytes=measured - predicted.process_bytes,
        scale_bytes=scale,
        kind=interval_kind(setup),
        things=run_traits(run) | model_traits(run.model),
        sizes=(
            setup.max_length,
            run.micro_step.tokens,
            setup.lora_r if setup.uses_lora else 0,
            run.model.parameter_count,
        ),
    )
