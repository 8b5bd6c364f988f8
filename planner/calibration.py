"""Calibration: measured runs -> the coefficients of what cannot be counted, and what is left unexplained.

Held-out residuals decide the interval: every record is predicted from a fit without its model, and the
margin covers the worst of them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.errors import InputError, NotModelledError
from planner.gpu_spec import GpuSpec
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.estimate import estimate_memory, reserve_terms
from planner.memory.runtime import Coefficients, coefficients_for, managed_process_bytes
from planner.memory.step_replay import replay_steps
from planner.model_spec import ModelSpec
from planner.records import RunRecord

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
MIN_RECORDS = 3
STACK_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
Resolve = Callable[[str], ModelSpec]


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """A record beside its prediction from a fit that has not seen its model, by one way of telling reserve.

    Errors are predicted / measured - 1; `process_error` is null where the run shared its process.
    """

    record_id: str
    model: str
    allocated_error: float
    reserved_error: float
    process_error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Coefficients and the held-out residuals that their intervals rest on.

    `residuals` are those of the allocator's replay, `fitted_residuals` those of the fitted reserve.
    """

    coefficients: Coefficients
    residuals: tuple[Residual, ...]
    fitted_residuals: tuple[Residual, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    record: RunRecord
    model: ModelSpec
    terms: tuple[float, ...]
    reserve_bytes: int
    managed_bytes: int
    workspace_bytes: int


def usable_records(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve) -> list[RunRecord]:
    """Records of that GPU that ran to their end and whose setups are modelled."""
    return [sample.record for sample in _samples(records, gpu, resolve)]


def calibrate(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve, *, name: str) -> Calibration:
    """Fit the coefficients of one GPU.

    Raises:
        InputError: too few records of it.
    """
    samples = _samples(records, gpu, resolve)
    if len(samples) < MIN_RECORDS:
        raise InputError(
            f"{gpu.id}: {len(samples)} measured runs are too few to calibrate; {MIN_RECORDS} are needed"
        )
    residuals: dict[bool, list[Residual]] = {True: [], False: []}
    shortfalls: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
    for held_out in sorted({sample.record.setup.model for sample in samples}):
        rest = [sample for sample in samples if sample.record.setup.model != held_out]
        fitted = _fit(rest if len(rest) >= MIN_RECORDS else samples, gpu, name)
        for sample in samples:
            for replay in (True, False) if sample.record.setup.model == held_out else ():
                residual, shortfall = _residual(sample, fitted, gpu, replay=replay)
                residuals[replay].append(residual)
                shortfalls[replay].append(shortfall)
    coefficients = dataclasses.replace(
        _fit(samples, gpu, name),
        margin_fraction=round(max(shortfalls[False]) + MARGIN_SLACK, 4),
        replay_margin_blocks=round(max(shortfalls[True]) + REPLAY_MARGIN_SLACK, 4),
    )
    return Calibration(
        coefficients=coefficients,
        residuals=tuple(residuals[True]),
        fitted_residuals=tuple(residuals[False]),
    )


def _samples(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve) -> list[_Sample]:
    found = []
    bare = dataclasses.replace(coefficients_for(gpu.id), gpu=gpu.id, workspace_bytes=0)
    for record in records:
        step = record.phase("step")
        if record.environment.gpu_id != gpu.id or record.outcome != "ok" or step is None:
            continue
        # At its cap an allocator gives cached blocks back; a training run's data may not fill its length.
        capped = record.memory_cap_bytes is not None
        if capped and step.reserved_bytes > CAP_SHARE * (record.memory_cap_bytes or 0):
            continue
        if record.source != "calibrate":
            continue
        model = resolve(record.setup.model)
        try:
            breakdown = estimate_memory(record.setup, model, gpu=gpu, padded=record.padded)
        except NotModelledError:
            continue
        without_workspace = estimate_memory(
            record.setup, model, gpu=gpu, padded=record.padded, coefficients=bare
        )
        terms = reserve_terms(record.setup, model, gpu=gpu, padded=record.padded)
        found.append(
            _Sample(
                record=record,
                model=model,
                terms=tuple(float(value) for value in terms.as_tuple()),
                reserve_bytes=step.reserved_bytes - step.allocated_bytes,
                managed_bytes=_managed(breakdown),
                workspace_bytes=step.allocated_bytes - without_workspace.allocated_bytes,
            )
        )
    return found


def _managed(breakdown: MemoryBreakdown) -> int:
    """Managed memory in an estimate: what is outside reserved memory and is not the context."""
    context = next(c.size_bytes for c in breakdown.components if c.name == "context")
    return breakdown.process_bytes - breakdown.reserved_bytes - context


def _fit(samples: Sequence[_Sample], gpu: GpuSpec, name: str) -> Coefficients:
    constant, *slopes = _non_negative_fit(samples)
    contexts = [
        step.process_bytes - step.reserved_bytes - managed_process_bytes(sample.managed_bytes)
        for sample in samples
        if sample.record.isolated
        and (step := sample.record.phase("step")) is not None
        and step.process_bytes is not None
    ]
    if not contexts:
        raise InputError(f"{gpu.id}: no run had a process of its own, so the context cannot be told")
    latest = max(samples, key=lambda sample: sample.record.created).record
    return Coefficients(
        name=name,
        context_bytes=int(statistics.median(contexts)),
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
        stack_versions=tuple(
            (package, version)
            for package, version in latest.environment.versions
            if package in STACK_PACKAGES
        ),
    )


def _non_negative_fit(samples: Sequence[_Sample]) -> list[float]:
    """Least squares on the reserve, each record weighted by its reserved memory; negative terms are dropped.

    A reserve that shrinks with a larger layer has no meaning, so terms that come out negative are taken out,
    the most negative first, and the rest fitted again.
    """
    import numpy as np

    rows = np.array([(1.0, *sample.terms) for sample in samples])
    target = np.array([float(sample.reserve_bytes) for sample in samples])
    weight = np.array([1.0 / _reserved(sample) for sample in samples])
    active = list(range(rows.shape[1]))
    solution = np.zeros(rows.shape[1])
    while active:
        found, *_ = np.linalg.lstsq(rows[:, active] * weight[:, None], target * weight, rcond=None)
        if found.min() >= 0:
            solution[active] = found
            break
        active.pop(int(found.argmin()))
    return [float(value) for value in solution]


def _reserved(sample: _Sample) -> int:
    step = sample.record.phase("step")
    if step is None:
        raise InputError(f"{sample.record.id}: no step was measured")
    return step.reserved_bytes


def _residual(sample: _Sample, fitted: Coefficients, gpu: GpuSpec, *, replay: bool) -> tuple[Residual, float]:
    """Errors of a held-out record; what it needed beyond expected and the interval's constant part, as a
    share of what the rest of the interval is a share of.
    """
    record = sample.record
    step = record.phase("step")
    if step is None:
        raise InputError(f"{record.id}: no step was measured")
    predicted = estimate_memory(
        record.setup, sample.model, gpu=gpu, padded=record.padded, coefficients=fitted, replay=replay
    )
    own_process = step.process_bytes if record.isolated else None
    # In a shared process the driver's figure holds what earlier runs left; reserve and context tell instead.
    beyond = predicted.process_bytes - predicted.reserved_bytes
    measured = own_process if own_process is not None else step.reserved_bytes + beyond
    residual = Residual(
        record_id=record.id,
        model=record.setup.model,
        allocated_error=predicted.allocated_bytes / step.allocated_bytes - 1,
        reserved_error=predicted.reserved_bytes / step.reserved_bytes - 1,
        process_error=None if own_process is None else predicted.process_bytes / own_process - 1,
    )
    beyond_expected = measured - predicted.process_bytes
    if replay:
        steps = replay_steps(record.setup, sample.model, gpu=gpu, padded=record.padded)
        shortfall = (beyond_expected - fitted.replay_margin_bytes) / steps.largest_block_bytes
    else:
        shortfall = (beyond_expected - fitted.margin_bytes) / sum(sample.terms)
    return residual, max(0.0, shortfall)
