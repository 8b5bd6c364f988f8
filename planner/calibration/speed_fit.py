"""Fit of throughput rates to measured runs, and what it leaves unexplained of models that it has not seen.

Rates are positive, so their logarithms are fitted, to the logarithm of the step's time, by damped least
squares (Levenberg 1944, Marquardt 1963) with a loss that grows linearly beyond ten percent: a run disturbed
by its machine does not pull the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from planner.base.errors import InputError, NotModelledError
from planner.base.values import dataclass
from planner.calibration.records import RunRecord
from planner.calibration.speed_problem import START, RatesProblem, as_launched, host_factor, step_seconds
from planner.gpus.spec import GpuSpec
from planner.models.spec import ModelSpec
from planner.setup.attention import SKIPS_MASKED
from planner.throughput.rates import UNCALIBRATED, Rates, micro_step_time
from planner.throughput.roofline import NoForecastError, borrowed_rates
from planner.throughput.work import StepWork, step_work
from planner.throughput.work_kinds import WORK_KINDS

REFERENCE_GPU = "h100-80gb"
"""The GPU with most runs: its rates are fitted from START, other GPUs' from its own, scaled."""
FIRMNESS = (1.0, 5.0, 25.0, 125.0)
"""How many times as firmly rates may be held at another GPU's: as held-out models say, so that a few runs
never make a forecast worse than the borrowed one was. The firmest all but keeps them.
"""
TOLD_SHARE, TOLD_RUNS = 0.05, 8
"""A rate is held at another GPU's as firmly as all, where it took so much of a step in so many of that GPU's
runs; one that hardly any run has told is held there no firmer than at START.
"""
MIN_RUNS = 8
MIN_RUNS_FROM_START = 3
"""Runs that are needed without another GPU's rates to start from, and with them."""
QUANTILES = (0.05, 0.95)


class TooFewRunsError(InputError):
    """A GPU has too few timed runs to fit rates to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedResidual:
    """A run beside its forecast from a fit that has not seen its model: predicted / measured - 1.

    `launches` says that the run waits for its host, which launches kernels, rather than for the GPU;
    `as_launched` that its trainer was today's.
    """

    record_id: str
    model: str
    error: float
    launches: bool = False
    as_launched: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedFit:
    """Rates and the held-out residuals that their interval rests on."""

    rates: Rates
    residuals: tuple[SpeedResidual, ...]


def fit_rates(
    records: Sequence[RunRecord],
    gpu_id: str,
    resolve: Callable[[str], ModelSpec],
    *,
    start: Rates | None = None,
) -> SpeedFit:
    """Fit one GPU's rates to its runs; each model is left out once.

    `start` is what a rate falls back to that no run tells: another GPU's, scaled; START without it. How
    firmly is chosen by the held-out errors, which are then a little too kind. The intervals are those of GPUs
    without runs until MIN_RUNS held-out ones tell.

    Raises:
        TooFewRunsError: there are too few runs.
    """
    import numpy as np

    pairs = _timed_work(records, gpu_id, resolve)
    needed = MIN_RUNS if start is None else MIN_RUNS_FROM_START
    if len(pairs) < needed:
        raise TooFewRunsError(f"{gpu_id}: {len(pairs)} timed runs are too few for rates; {needed} are needed")
    block = _usual_block([record for record, _ in pairs])
    told = told_kinds(records, start, resolve)
    problem, residuals = _best_held(pairs, start, block, told)
    rates = Rates(
        gpu=gpu_id,
        seconds=problem.rates(problem.solve(np.arange(len(pairs)))),
        low=UNCALIBRATED[0],
        high=UNCALIBRATED[1],
        launch_low=UNCALIBRATED[0],
        launch_high=UNCALIBRATED[1],
        host_block_seconds=block,
        record_ids=tuple(sorted(record.id for record, _ in pairs)),
    )
    launches = {
        record.id
        for record, work in pairs
        if micro_step_time(rates, work, host_slower=host_factor(record, block)).bound_by == "launches"
    }
    residuals = tuple(replace(one, launches=one.record_id in launches) for one in residuals)
    return SpeedFit(rates=_with_intervals(rates, telling(residuals)), residuals=residuals)


def _timed_work(
    records: Sequence[RunRecord], gpu_id: str, resolve: Callable[[str], ModelSpec]
) -> list[tuple[RunRecord, StepWork]]:
    """One GPU's timed runs and their work, without those whose work is not counted."""
    runs = [record for record in records if record.environment.gpu_id == gpu_id and _timed(record)]
    return [(record, work) for record in runs if (work := _work(record, resolve)) is not None]


def told_kinds(
    records: Sequence[RunRecord], start: Rates | None, resolve: Callable[[str], ModelSpec]
) -> frozenset[str]:
    """Kinds of work whose rates the runs behind `start` tell."""
    if start is None:
        return frozenset()
    behind = set(start.record_ids)
    found: Counter[str] = Counter()
    for record in records:
        if record.id not in behind or (work := _work(record, resolve)) is None:
            continue
        accumulated = record.setup.gradient_accumulation_steps
        for kind, rate in zip(WORK_KINDS, start.seconds.numbers, strict=True):
            micro = work.forward[kind.name] + work.backward[kind.name] + work.micro_step[kind.name]
            seconds = (micro * accumulated + work.optimizer_step[kind.name]) * rate
            found[kind.name] += seconds >= TOLD_SHARE * step_seconds(record)
    return frozenset(name for name, count in found.items() if count >= TOLD_RUNS)


def _best_held(
    pairs: Sequence[tuple[RunRecord, StepWork]],
    start: Rates | None,
    host_block_seconds: float | None,
    told: frozenset[str],
) -> tuple[RatesProblem, tuple[SpeedResidual, ...]]:
    """The equations held at their start as firmly as forecasts models left out best, and those errors."""
    begin = START if start is None else start.seconds
    timed = [record for record, _ in pairs]
    problems = [
        RatesProblem(pairs, begin, firmness, host_block_seconds, told)
        for firmness in (FIRMNESS if start else FIRMNESS[:1])
    ]
    return min(
        ((problem, _held_out(problem, timed)) for problem in problems),
        key=lambda pair: fmean(abs(one.error) for one in telling(pair[1])) if pair[1] else 0.0,
    )


def _with_intervals(rates: Rates, residuals: Sequence[SpeedResidual]) -> Rates:
    """The rates with the intervals that held-out runs tell, by what they wait for, where enough do."""
    import numpy as np

    for prefix, wanted in (("", False), ("launch_", True)):
        errors = [one.error for one in residuals if one.launches is wanted]
        if len(errors) >= MIN_RUNS:
            low, high = np.quantile([1 / (1 + error) for error in errors], QUANTILES)
            edges: dict[str, Any] = {
                f"{prefix}low": min(1.0, round(float(low), 3)),
                f"{prefix}high": max(1.0, round(float(high), 3)),
            }
            rates = replace(rates, **edges)
    return rates


def telling(residuals: Sequence[SpeedResidual]) -> tuple[SpeedResidual, ...]:
    """Those of runs as they are launched today, where there are enough of them; else all."""
    found = tuple(one for one in residuals if one.as_launched)
    return found if len(found) >= MIN_RUNS else tuple(residuals)


def _held_out(problem: RatesProblem, records: Sequence[RunRecord]) -> tuple[SpeedResidual, ...]:
    """Errors of each model's runs by a fit to the other models'; none where there is but one model."""
    import numpy as np

    models = np.array([record.setup.model for record in records])
    everything = np.arange(len(records))
    if len(set(models)) < 2:
        return ()
    errors = np.zeros(len(records))
    for model in sorted(set(models)):
        held = models == model
        solution = problem.solve(everything[~held])
        errors[held] = problem.seconds[held] / problem.predict(solution, everything[held]) - 1
    return tuple(
        SpeedResidual(
            record_id=record.id,
            model=record.setup.model,
            error=float(error),
            as_launched=as_launched(record),
        )
        for record, error in zip(records, errors, strict=True)
    )


def start_for(gpu: GpuSpec) -> Rates | None:
    """What a GPU's fit starts from: rates borrowed from another one; None for START."""
    if gpu.id == REFERENCE_GPU:
        return None
    try:
        return borrowed_rates(gpu).rates
    except NoForecastError:
        return None


def forecast_errors(
    records: Sequence[RunRecord], rates: Rates, resolve: Callable[[str], ModelSpec]
) -> tuple[SpeedResidual, ...]:
    """Errors of timed runs by rates that were not fitted to them."""
    found = []
    for record in filter(_timed, records):
        work = _work(record, resolve)
        if work is not None:
            slower = host_factor(record, rates.host_block_seconds)
            micro = micro_step_time(rates, work, host_slower=slower)
            update = rates.optimizer_seconds(work, host_slower=slower)
            step = micro.seconds * record.setup.gradient_accumulation_steps + update
            found.append(
                SpeedResidual(
                    record_id=record.id,
                    model=record.setup.model,
                    error=step_seconds(record) / step - 1,
                    launches=micro.bound_by == "launches",
                    as_launched=as_launched(record),
                )
            )
    return tuple(found)


def _usual_block(records: Sequence[RunRecord]) -> float | None:
    """The median time of an eager block on the runs' hosts; None where too few were timed."""
    timed = [r.host_block_seconds for r in records if r.host_block_seconds is not None]
    return median(timed) if len(timed) >= MIN_RUNS_FROM_START else None


def _timed(record: RunRecord) -> bool:
    """Whether the run tells how fast such a run is when it is launched."""
    by_tf32 = record.tf32 or record.setup.dtype != "float32"
    alone = record.setup.num_processes == 1
    timed = alone and record.outcome == "ok" and record.tokens_per_second is not None
    # These compute no pair of two packed examples; their work is counted for whole rows.
    skips = record.lengths and record.setup.attn_implementation in SKIPS_MASKED
    return timed and record.fills_its_length and by_tf32 and not skips


def _work(record: RunRecord, resolve: Callable[[str], ModelSpec]) -> StepWork | None:
    try:
        return step_work(record.run(resolve(record.setup.model)))
    except NotModelledError:
        return None
