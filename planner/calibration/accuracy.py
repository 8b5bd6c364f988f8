"""Accuracy: what the committed records say of memory and speed, each model held out of its fit."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence

from planner.base.data_files import PROFILES
from planner.base.errors import NotModelledError
from planner.base.values import dataclass
from planner.calibration.memory_fit import Residual, held_out_residuals
from planner.calibration.published import PublishedRun, published_runs
from planner.calibration.records import RunRecord, read_records
from planner.calibration.speed_fit import (
    SpeedResidual,
    TooFewRunsError,
    fit_rates,
    forecast_errors,
    start_for,
    telling,
)
from planner.gpus.card_class import CARD_CLASSES, CardClass, card_class
from planner.gpus.catalog import gpu_catalog
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.estimate import estimate_memory
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS
from planner.throughput.roofline import forecast

OVER_THE_HOST = "torch.distributed"
"""Among a record's versions where its ranks did not use NCCL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorSummary:
    """Errors of one figure over runs, as shares: signed mean, median and 95th percentile of size, worst.

    `runs` counts those where the figure was measured; the errors are null when there is none.
    """

    figure: str
    runs: int
    bias: float | None
    median: float | None
    percentile_95: float | None
    worst: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAccuracy:
    """Errors of one held-out model's runs."""

    model: str
    runs: int
    summaries: tuple[ErrorSummary, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Held-out errors on one GPU with one of torch's allocators: all runs together, and by model."""

    gpu: str
    allocator: str
    overall: tuple[ErrorSummary, ...]
    models: tuple[ModelAccuracy, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedSummary:
    """Errors of tokens a second, as shares: signed mean, median and 90th percentile of size, worst."""

    runs: int
    bias: float
    median: float
    percentile_90: float
    worst: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpeed:
    """Errors of one held-out model's runs."""

    model: str
    summary: SpeedSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedAccuracy:
    """Errors of tokens a second on one GPU: `held_out` by its own runs of other models, all together and by
    model (None: too few runs), of which `gpu_bound` and `host_bound` are those whose time the one or the
    other decides; and `borrowed` by another GPU's rates, scaled (None for the reference). They are of runs as
    launched today where there are enough; `earlier` are the others' (None: there are none).
    """

    gpu: str
    held_out: SpeedSummary | None
    gpu_bound: SpeedSummary | None
    host_bound: SpeedSummary | None
    earlier: SpeedSummary | None
    models: tuple[ModelSpeed, ...]
    borrowed: SpeedSummary | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SeveralRun:
    """Errors of one run on several GPUs, as shares: of the rank that is furthest off, and of tokens a second
    of all together (null: not measured). `within_interval` says that no rank's driver showed more than its
    end.
    """

    gpu: str
    model: str
    method: str
    num_processes: int
    distributed: str
    allocated: float | None
    reserved: float | None
    process: float | None
    within_interval: bool
    speed: float | None
    record_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSpeed:
    """Errors of tokens a second on the runs that others published of one class of cards, none of which is
    fitted: `gpus` they are of, how many `sources` have them, and how many are `covered` by their forecast's
    interval.
    """

    card_class: CardClass
    gpus: tuple[str, ...]
    sources: int
    summary: SpeedSummary
    covered: int


def shipped_records() -> tuple[RunRecord, ...]:
    """The committed records, a person's own left out."""
    return tuple(r for path in sorted((PROFILES / "runs").glob("*.jsonl")) for r in read_records(path))


def several_records() -> tuple[RunRecord, ...]:
    """The committed records of runs on several GPUs, which no fit reads."""
    return _records_of("several")


def traced_records() -> tuple[RunRecord, ...]:
    """The committed records of models that were traced, which no fit reads: they judge what tracing says."""
    return _records_of("traced")


def _records_of(folder: str) -> tuple[RunRecord, ...]:
    paths = sorted((PROFILES / "runs" / folder).glob("*.jsonl"))
    return tuple(r for path in paths for r in read_records(path))


def accuracy(records: Sequence[RunRecord]) -> tuple[Accuracy, ...]:
    """Held-out errors on every GPU with enough records, by allocator.

    Raises:
        InputError: a GPU has too few records to leave any out.
    """
    found = []
    for gpu_id, allocator in _measured(records):
        residuals = held_out_residuals(records, gpu_catalog().get(gpu_id), load_shipped, allocator=allocator)
        by_model = sorted({residual.model for residual in residuals})
        found.append(
            Accuracy(
                gpu=gpu_id,
                allocator=allocator,
                overall=_summaries(residuals),
                models=tuple(
                    _model_accuracy(model, [r for r in residuals if r.model == model]) for model in by_model
                ),
            )
        )
    return tuple(found)


def _measured(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """GPUs and allocators that runs of full sequences were made with: by GPU, expandable segments first."""
    there = {
        (r.environment.gpu_id, r.allocator)
        for r in records
        if r.fills_its_length and r.setup.num_processes == 1
    }
    return sorted(there, key=lambda pair: (pair[0], ALLOCATORS.index(pair[1])))


def _model_accuracy(model: str, residuals: Sequence[Residual]) -> ModelAccuracy:
    return ModelAccuracy(model=model, runs=len(residuals), summaries=_summaries(residuals))


def _summaries(residuals: Sequence[Residual]) -> tuple[ErrorSummary, ...]:
    columns = (
        ("allocated", [r.allocated_error for r in residuals]),
        ("reserved", [r.reserved_error for r in residuals]),
        ("process", [r.process_error for r in residuals if r.process_error is not None]),
    )
    return tuple(_summary(figure, errors) for figure, errors in columns)


def _summary(figure: str, errors: Sequence[float]) -> ErrorSummary:
    if not errors:
        return ErrorSummary(figure=figure, runs=0, bias=None, median=None, percentile_95=None, worst=None)
    sizes = sorted(abs(error) for error in errors)
    return ErrorSummary(
        figure=figure,
        runs=len(errors),
        bias=statistics.fmean(errors),
        median=statistics.median(sizes),
        percentile_95=sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))],
        worst=max(errors, key=abs),
    )


def speed_accuracy(records: Sequence[RunRecord]) -> tuple[SpeedAccuracy, ...]:
    """Errors of tokens a second on every GPU with timed runs."""
    by_gpu: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.setup.num_processes == 1:
            by_gpu.setdefault(record.environment.gpu_id, []).append(record)
    return tuple(_speed(gpu_id, by_gpu[gpu_id]) for gpu_id in sorted(by_gpu))


def published_accuracy() -> tuple[PublishedSpeed, ...]:
    """Errors on published runs by class of card, in CARD_CLASSES' order; classes without runs left out."""
    by_class: dict[CardClass, list[PublishedRun]] = {}
    for run in published_runs()[0]:
        by_class.setdefault(card_class(run.gpu), []).append(run)
    return tuple(_published(name, by_class[name]) for name in CARD_CLASSES if name in by_class)


def _published(name: CardClass, runs: Sequence[PublishedRun]) -> PublishedSpeed:
    return PublishedSpeed(
        card_class=name,
        gpus=tuple(sorted({run.gpu.id for run in runs})),
        sources=len({run.source for run in runs}),
        summary=_errors_summary([run.error for run in runs]),
        covered=sum(run.covered for run in runs),
    )


def several_gpus(records: Sequence[RunRecord]) -> tuple[SeveralRun, ...]:
    """Errors of every run on several GPUs that is modelled: by the coefficients and rates of runs on one GPU,
    none of which is held out.
    """
    found = []
    for record in filter(_on_several, records):
        with contextlib.suppress(NotModelledError):
            found.append(_several(record))
    return tuple(found)


LEFT_UNCOMPILED = frozenset({"20261201-5234c5f63ec3"})
"""Runs on FSDP2 that asked for compiled layers before the launcher compiled within its hooks: they allocated
what the same run uncompiled does, to the byte (20261201-fa917b3e8010), which is what they were."""


def _on_several(record: RunRecord) -> bool:
    if record.id in LEFT_UNCOMPILED:
        return False
    return record.setup.num_processes > 1 and record.outcome == "ok" and record.phase("step") is not None


def _several(record: RunRecord) -> SeveralRun:
    setup, gpu = record.setup, gpu_catalog().get(record.environment.gpu_id)
    run = record.run(load_shipped(setup.model))
    memory = estimate_memory(run, gpu=gpu, replay=True, allocator=record.allocator)
    absent = _absent_bytes(record, memory)
    expected = memory.allocated_bytes, memory.reserved_bytes, memory.process_bytes - absent
    worst: list[float | None] = [None, None, None]
    steps = [phase for rank in record.ranks for phase in rank if phase.name == "step"]
    for step in steps or [phase for phase in record.phases if phase.name == "step"]:
        measured = step.allocated_bytes, step.reserved_bytes, step.process_bytes
        for at, (told, seen) in enumerate(zip(expected, measured, strict=True)):
            if seen:
                worst[at] = max(told / seen - 1, worst[at] or 0.0, key=abs)
    speed = None if record.tokens_per_second is None else forecast(run, gpu)
    return SeveralRun(
        gpu=gpu.id,
        model=setup.model,
        method=setup.method,
        num_processes=setup.num_processes,
        distributed=setup.distributed or "",
        allocated=worst[0],
        reserved=worst[1],
        process=worst[2],
        within_interval=all(
            phase.process_bytes is None or phase.process_bytes <= memory.process_upper_bytes - absent
            for phase in steps
        ),
        speed=None
        if speed is None or record.tokens_per_second is None
        else speed.tokens_per_second / record.tokens_per_second - 1,
        record_id=record.id,
    )


def _absent_bytes(record: RunRecord, memory: MemoryBreakdown) -> int:
    """NCCL's memory, where ranks talked over the host (launcher/measuring/one_gpu.py)."""
    if OVER_THE_HOST not in (package for package, _ in record.environment.versions):
        return 0
    return sum(part.size_bytes for part in memory.components if part.name == "nccl")


def _speed(gpu_id: str, records: Sequence[RunRecord]) -> SpeedAccuracy:
    start = start_for(gpu_catalog().get(gpu_id))
    residuals: tuple[SpeedResidual, ...] = ()
    with contextlib.suppress(TooFewRunsError):
        residuals = fit_rates(records, gpu_id, load_shipped, start=start).residuals
    everything, residuals = residuals, telling(residuals)
    shown = {residual.record_id for residual in residuals}
    by_model: dict[str, list[SpeedResidual]] = {}
    for residual in residuals:
        by_model.setdefault(residual.model, []).append(residual)
    models = []
    for model in sorted(by_model):
        summary = _speed_summary(by_model[model])
        if summary is not None:
            models.append(ModelSpeed(model=model, summary=summary))
    borrowed = () if start is None else forecast_errors(records, start, load_shipped)
    return SpeedAccuracy(
        gpu=gpu_id,
        held_out=_speed_summary(residuals),
        gpu_bound=_speed_summary([one for one in residuals if not one.launches]),
        host_bound=_speed_summary([one for one in residuals if one.launches]),
        earlier=_speed_summary([one for one in everything if one.record_id not in shown]),
        models=tuple(models),
        borrowed=_speed_summary(telling(borrowed)),
    )


def _speed_summary(residuals: Sequence[SpeedResidual]) -> SpeedSummary | None:
    return _errors_summary([residual.error for residual in residuals]) if residuals else None


def _errors_summary(errors: Sequence[float]) -> SpeedSummary:
    sizes = sorted(abs(error) for error in errors)
    return SpeedSummary(
        runs=len(errors),
        bias=statistics.fmean(errors),
        median=statistics.median(sizes),
        percentile_90=sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        worst=max(errors, key=abs),
    )
