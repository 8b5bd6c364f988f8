"""Calibration: measured runs -> the coefficients of what cannot be counted, and what is left unexplained.

Held-out residuals decide the interval: every record is predicted from a fit without its model, and the
margin covers the worst of them (planner/margins.py).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.errors import InputError, NotModelledError
from planner.gpu_catalog import gpu_catalog
from planner.gpu_spec import GpuSpec
from planner.margins import HeldOutThing, Shortfall, held_out_things, margin_share, outside_factor
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.coverage import coverage_of, model_values, setup_values
from planner.memory.estimate import estimate_memory, reserve_terms
from planner.memory.runtime import (
    INTERVAL_KINDS,
    Coefficients,
    KindShares,
    coefficients_for,
    interval_kind,
    managed_process_bytes,
)
from planner.memory.step_replay import replay_steps
from planner.model_spec import ModelSpec
from planner.records import RunRecord
from planner.reserve_fit import non_negative_fit

MIB = 2**20
MARGIN_BYTES = 256 * MIB
"""Constant part of the interval: about two of the allocator's larger cached blocks in the records."""
REPLAY_MARGIN_BYTES = 64 * MIB
"""The same where the allocator is replayed: a few segments of 20 MiB."""
MARGIN_SLACK = 0.02
"""Added to the worst held-out shortfall (a share of the terms): the next run is not among the records."""
REPLAY_MARGIN_SLACK = 0.1
"""The same where the allocator is replayed, in blocks of the largest size that a step asks for."""
CAP_SHARE = 0.85
"""Share of a memory cap below which a run never met it, so that its allocator gave no cached block back."""
LEFT_OVER_BYTES = 2 * MIB
"""What the driver's figure may move by while a model is loaded, beyond the allocator's segments."""
LOADED_BYTES = 16 * MIB
"""What kernels that only earlier runs in the process used may add to its context."""
MIN_RECORDS = 3
STACK_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
Resolve = Callable[[str], ModelSpec]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    record: RunRecord
    model: ModelSpec
    terms: tuple[float, ...]
    reserve_bytes: int
    managed_bytes: int
    workspace_bytes: int
    own_process_bytes: int | None
    met_cap: bool


def clean_context_bytes(records: Sequence[RunRecord], gpu_id: str) -> int:
    """What the driver shows beyond reserved memory on a GPU in a process whose runs have left nothing but
    their kernels: the least at the end of a process's first run that had no managed memory (0 without one).
    """
    steps = (
        record.phase("step")
        for record in records
        if record.environment.gpu_id == gpu_id and record.isolated and "paged" not in record.setup.optim
    )
    beyond = (step.process_bytes - step.reserved_bytes for step in steps if step and step.process_bytes)
    return min(beyond, default=0)


def own_process_bytes(record: RunRecord, clean_bytes: int = 0) -> int | None:
    """The driver's figure at the end of a step where it is the run's own; null where it is not, or not read.

    It is where the run was the first in its process. It is too where the context before it was a clean one
    (`clean_context_bytes`: managed memory, streams and compiled kernels of earlier runs stay in a process)
    and the driver showed no more after loading than that and reserved memory.
    """
    step, load = record.phase("step"), record.phase("load")
    if step is None or step.process_bytes is None or record.isolated:
        return None if step is None else step.process_bytes
    if load is None or load.process_bytes is None or record.context_bytes > clean_bytes + LOADED_BYTES:
        return None
    left = load.process_bytes - load.reserved_bytes - record.context_bytes
    return step.process_bytes if abs(left) <= LEFT_OVER_BYTES else None


def usable_records(
    records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve, *, allocator: str
) -> list[RunRecord]:
    """Records of that GPU and allocator that ran to their end and whose setups are modelled."""
    return [
        sample.record for sample in _samples(records, gpu, resolve) if sample.record.allocator == allocator
    ]


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
    pool = _enough([one for one in measured if one.record.allocator == allocator], allocator)
    residuals, shortfalls = _held_out(samples, pool, gpu, name)
    for other, there in by_gpu.items():
        if other != gpu.id:
            for replay, found in _held_out(there, pool, gpu_catalog().get(other), other)[1].items():
                shortfalls[replay] += found
    things = held_out_things(shortfalls[True], constant_bytes=REPLAY_MARGIN_BYTES, slack=REPLAY_MARGIN_SLACK)
    fitted = dataclasses.replace(
        _fit(samples, pool, gpu, name),
        coverage=coverage_of((s.record.setup, s.model, s.record.padded) for s in measured),
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
    samples = [sample for there in by_gpu.values() for sample in there]
    pool = _enough([one for one in samples if one.record.allocator == allocator], allocator)
    residuals, _ = _held_out(_enough(by_gpu[gpu.id], gpu.id), pool, gpu, gpu.id)
    return tuple(residuals[True])


def _enough(samples: list[_Sample], what: str) -> list[_Sample]:
    if len(samples) < MIN_RECORDS:
        raise InputError(
            f"{what}: {len(samples)} measured runs are too few to calibrate; {MIN_RECORDS} are needed"
        )
    return samples


def _by_gpu(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve) -> dict[str, list[_Sample]]:
    """Samples of a GPU, and of the catalog's other ones that have enough."""
    there = {record.environment.gpu_id for record in records} - {gpu.id}
    others = ((one.id, _samples(records, one, resolve)) for one in gpu_catalog() if one.id in there)
    return {gpu.id: _samples(records, gpu, resolve)} | {
        other: samples for other, samples in others if len(samples) >= MIN_RECORDS
    }


def _held_out(
    samples: Sequence[_Sample], pool: Sequence[_Sample], gpu: GpuSpec, name: str
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


def _without(model: str, samples: Sequence[_Sample]) -> Sequence[_Sample]:
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
                    slack=REPLAY_MARGIN_SLACK,
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


def _samples(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve) -> list[_Sample]:
    found = []
    clean = clean_context_bytes(records, gpu.id)
    for record in records:
        step = record.phase("step")
        if record.environment.gpu_id != gpu.id or record.outcome != "ok" or step is None:
            continue
        if not record.fills_its_length:
            continue
        model, allocator = resolve(record.setup.model), record.allocator
        bare = dataclasses.replace(coefficients_for(gpu.id, allocator), gpu=gpu.id, workspace_bytes=0)
        try:
            breakdown = estimate_memory(
                record.setup, model, gpu=gpu, padded=record.padded, allocator=allocator
            )
        except NotModelledError:
            continue
        without_workspace = estimate_memory(
            record.setup, model, gpu=gpu, padded=record.padded, coefficients=bare, allocator=allocator
        )
        terms = reserve_terms(record.setup, model, gpu=gpu, padded=record.padded, allocator=allocator)
        found.append(
            _Sample(
                record=record,
                model=model,
                terms=tuple(float(value) for value in terms.as_tuple()),
                reserve_bytes=step.reserved_bytes - step.allocated_bytes,
                managed_bytes=_managed(breakdown),
                workspace_bytes=step.allocated_bytes - without_workspace.allocated_bytes,
                own_process_bytes=own_process_bytes(record, clean),
                met_cap=step.reserved_bytes > CAP_SHARE * (record.memory_cap_bytes or 2**60),
            )
        )
    return found


def _managed(breakdown: MemoryBreakdown) -> int:
    """Managed memory in an estimate: what is outside reserved memory and is not the context."""
    context = next(c.size_bytes for c in breakdown.components if c.name == "context")
    return breakdown.process_bytes - breakdown.reserved_bytes - context


def _fit(samples: Sequence[_Sample], pool: Sequence[_Sample], gpu: GpuSpec, name: str) -> Coefficients:
    """Coefficients of a GPU from its own samples; the reserve's from the pool's, which have one allocator."""
    # At its cap an allocator gives cached blocks back.
    uncapped = [sample for sample in pool if not sample.met_cap] or pool
    constant, *slopes = non_negative_fit(
        [sample.terms for sample in uncapped],
        [sample.reserve_bytes for sample in uncapped],
        [_reserved(sample) for sample in uncapped],
    )
    contexts = [
        (own - _reserved(sample) - managed_process_bytes(sample.managed_bytes), sample.record.isolated)
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
        coverage=coverage_of((s.record.setup, s.model, s.record.padded) for s in samples),
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
            (package, version)
            for package, version in latest.environment.versions
            if package in STACK_PACKAGES
        ),
    )


def _reserved(sample: _Sample) -> int:
    step = sample.record.phase("step")
    if step is None:
        raise InputError(f"{sample.record.id}: no step was measured")
    return step.reserved_bytes


def _residual(
    sample: _Sample, fitted: Coefficients, gpu: GpuSpec, *, replay: bool
) -> tuple[Residual, Shortfall]:
    """Errors of a held-out record, and what it needed beyond its expected figure."""
    record, setup, model = sample.record, sample.record.setup, sample.model
    step = record.phase("step")
    if step is None:
        raise InputError(f"{record.id}: no step was measured")
    predicted = estimate_memory(
        setup,
        model,
        gpu=gpu,
        padded=record.padded,
        coefficients=fitted,
        replay=replay,
        allocator=record.allocator,
    )
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
        scale = replay_steps(
            setup, model, gpu=gpu, padded=record.padded, allocator=record.allocator
        ).largest_block_bytes
    return residual, Shortfall(
        beyond_bytes=measured - predicted.process_bytes,
        scale_bytes=scale,
        kind=interval_kind(setup),
        things=setup_values(setup, model, padded=record.padded) | model_values(model),
        sizes=(
            setup.max_length,
            setup.tokens_per_micro_step,
            setup.lora_r if setup.uses_lora else 0,
            model.parameter_count,
        ),
    )
