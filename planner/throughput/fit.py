"""Fit of throughput rates to measured runs, and what it leaves unexplained of models that it has not seen.

Rates are positive, so their logarithms are fitted, to the logarithm of the step's time, by damped least
squares (Levenberg 1944, Marquardt 1963) with a loss that grows linearly beyond ten percent: a run disturbed
by its machine does not pull the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from planner.errors import InputError, NotModelledError
from planner.gpu_spec import GpuSpec
from planner.model_spec import ModelSpec
from planner.records import RunRecord
from planner.throughput.rates import OVERLAP, UNCALIBRATED, Rates, beside_copies, micro_step_time
from planner.throughput.roofline import NoForecastError, borrowed_rates
from planner.throughput.work import PassWork, StepWork, step_work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

REFERENCE_GPU = "h100-80gb"
"""The GPU with most runs: its rates are fitted from START, other GPUs' from its own, scaled."""
START = {
    "layer_flop_seconds": 1 / 6e14,
    "attention_flop_seconds": 1 / 4e14,
    "masked_attention_flop_seconds": 1 / 2e14,
    "head_flop_seconds": 1 / 5e14,
    "adapter_flop_seconds": 1 / 6e14,
    "single_flop_seconds": 1 / 5e13,
    "written_byte_seconds": 1e-12,
    "weight_byte_seconds": 1e-12,
    "offloaded_byte_seconds": 2e-11,
    "launch_seconds": 5e-5,
    "quantized_call_seconds": 1.5e-4,
    "lora_call_seconds": 3e-5,
    "liger_call_seconds": 5e-5,
    "selected_launch_seconds": 3e-5,
    "compiled_layer_seconds": 1e-3,
    "compiled_call_seconds": 5e-4,
    "micro_step_seconds": 4e-3,
    "optimizer_byte_seconds": 5e-13,
    "optimizer_call_seconds": 1e-4,
}
"""Where the reference's fit starts: roughly an H100 and its host."""
GPU_TERMS, HOST_TERMS = 9, 7
COPIED = GPU_TERMS - 1
"""Where START has the GPU's copies to the host, which lie beside its work."""
HOST_RATES = ("launch_seconds", "call_seconds", "compiled_layer_seconds", "micro_step_seconds")
PRIOR, COMMON_PRIOR = 0.3, 0.2
"""How firmly a logarithm is held at its start, beside a run's weight of one, and how firmly a factor that all
rates of the GPU or all of the host share. From starts off by 25% a rate, or twofold in all, these forecast
the reference's other runs best, be it from 3 of them or from 15.
"""
FIRMNESS = (1.0, 5.0, 25.0, 125.0)
"""How many times as firmly rates may be held at another GPU's: as held-out models say, so that a few runs
never make a forecast worse than the borrowed one was. The firmest all but keeps them.
"""
SOFT = 0.1
MIN_RUNS = 8
MIN_RUNS_FROM_START = 3
"""Runs that are needed without another GPU's rates to start from, and with them."""
ITERATIONS = 60
QUANTILES = (0.05, 0.95)


class TooFewRunsError(InputError):
    """A GPU has too few timed runs to fit rates to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedResidual:
    """A run beside its forecast from a fit that has not seen its model: predicted / measured - 1."""

    record_id: str
    model: str
    error: float


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

    runs = [record for record in records if record.environment.gpu_id == gpu_id and _timed(record)]
    pairs = [(record, work) for record in runs if (work := _work(record, resolve)) is not None]
    needed = MIN_RUNS if start is None else MIN_RUNS_FROM_START
    if len(pairs) < needed:
        raise TooFewRunsError(f"{gpu_id}: {len(pairs)} timed runs are too few for rates; {needed} are needed")
    begin = {name: START[name] if start is None else getattr(start, name) for name in START}
    timed = [record for record, _ in pairs]
    block = _usual_block(timed)
    problem, residuals = min(
        (
            (problem, _held_out(problem, timed))
            for problem in (
                _Problem(pairs, begin, held, block) for held in (FIRMNESS if start else FIRMNESS[:1])
            )
        ),
        key=lambda pair: fmean(abs(one.error) for one in pair[1]) if pair[1] else 0.0,
    )
    solution = np.exp(problem.factors(problem.solve(np.arange(len(pairs)))))
    rates = Rates(
        gpu=gpu_id,
        **{name: float(value * begin[name]) for name, value in zip(begin, solution, strict=True)},
        low=UNCALIBRATED[0],
        high=UNCALIBRATED[1],
        launch_low=UNCALIBRATED[0],
        launch_high=UNCALIBRATED[1],
        host_block_seconds=block,
        record_ids=tuple(sorted(record.id for record, _ in pairs)),
    )
    launches = [
        micro_step_time(rates, work, host_slower=_host_factor(record, block)).bound_by == "launches"
        for record, work in pairs
    ]
    for prefix, wanted in (("", False), ("launch_", True)):
        errors = [one.error for one, waits in zip(residuals, launches, strict=False) if waits is wanted]
        if len(errors) >= MIN_RUNS:
            low, high = np.quantile([1 / (1 + error) for error in errors], QUANTILES)
            edges: dict[str, Any] = {
                f"{prefix}low": min(1.0, round(float(low), 3)),
                f"{prefix}high": max(1.0, round(float(high), 3)),
            }
            rates = replace(rates, **edges)
    return SpeedFit(rates=rates, residuals=residuals)


def _held_out(problem: _Problem, records: Sequence[RunRecord]) -> tuple[SpeedResidual, ...]:
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
        SpeedResidual(record_id=record.id, model=record.setup.model, error=float(error))
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
            slower = _host_factor(record, rates.host_block_seconds)
            micro = micro_step_time(rates, work, host_slower=slower).seconds
            update = rates.optimizer_seconds(work, host_slower=slower)
            step = micro * record.setup.gradient_accumulation_steps + update
            error = _step_seconds(record) / step - 1
            found.append(SpeedResidual(record_id=record.id, model=record.setup.model, error=error))
    return tuple(found)


def _usual_block(records: Sequence[RunRecord]) -> float | None:
    """The median time of an eager block on the runs' hosts; None where it was not timed."""
    timed = [r.host_block_seconds for r in records if r.host_block_seconds is not None]
    return median(timed) if timed else None


def _host_factor(record: RunRecord, host_block_seconds: float | None) -> float:
    """How many times as long as that the run's host took for an eager block; 1 where it was not timed."""
    if record.host_block_seconds is None or host_block_seconds is None:
        return 1.0
    return record.host_block_seconds / host_block_seconds


def _timed(record: RunRecord) -> bool:
    return record.outcome == "ok" and record.tokens_per_second is not None and record.fills_its_length


def _work(record: RunRecord, resolve: Callable[[str], ModelSpec]) -> StepWork | None:
    try:
        return step_work(record.setup, resolve(record.setup.model), padded=record.padded)
    except NotModelledError:
        return None


class _Problem:
    """Runs as equations in the logarithms of rates, relative to where the fit starts, and in those
    of what the GPU's rates, and the host's, have in common. Host rates are those of a host that takes so long
    for an eager block.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[RunRecord, StepWork]],
        begin: Mapping[str, float],
        firmness: float,
        host_block_seconds: float | None,
    ) -> None:
        import numpy as np

        start = np.array(list(begin.values()))
        self._passes = [
            np.array([_pass_terms(work, part) for work, part in rows]) * start[: GPU_TERMS + HOST_TERMS]
            for rows in (
                [(work, work.forward) for _, work in pairs],
                [(work, work.backward) for _, work in pairs],
            )
        ]
        ends = [(1.0, work.optimizer_bytes, work.optimizer_calls) for _, work in pairs]
        self._ends = np.array(ends) * start[GPU_TERMS + HOST_TERMS :]
        self._host = np.array([_host_factor(record, host_block_seconds) for record, _ in pairs])
        self._accumulated = np.array([r.setup.gradient_accumulation_steps for r, _ in pairs], dtype=float)
        self.seconds = np.array([_step_seconds(record) for record, _ in pairs])
        of_host = np.array([name.endswith(HOST_RATES) for name in START])
        self._shared = np.stack([~of_host, of_host], axis=1).astype(float)
        self._priors = firmness * np.array([PRIOR] * len(START) + [COMMON_PRIOR] * 2)

    def factors(self, solution: Array) -> Array:
        """Logarithms of each rate's whole factor."""
        whole: Array = solution[: len(START)] + self._shared @ solution[len(START) :]
        return whole

    def predict(self, solution: Array, runs: NDArray[np.int64]) -> Array:
        """Seconds of a step."""
        import numpy as np

        rate = np.exp(self.factors(solution))
        micro_step, *update = GPU_TERMS + HOST_TERMS + np.arange(3)
        slower = self._host[runs]
        micro = self._ends[runs, 0] * rate[micro_step] * slower
        for terms in self._passes:
            work = terms[runs, :COPIED] @ rate[:COPIED]
            gpu = beside_copies(work, terms[runs, COPIED] * rate[COPIED])
            host = terms[runs, GPU_TERMS:] @ rate[GPU_TERMS:micro_step] * slower
            micro = micro + (gpu**OVERLAP + host**OVERLAP) ** (1 / OVERLAP)
        moved, called = (self._ends[runs, 1 + k] * rate[update[k]] for k in range(2))
        seconds: Array = micro * self._accumulated[runs] + moved + called * slower
        return seconds

    def _errors(self, solution: Array, runs: NDArray[np.int64]) -> Array:
        import numpy as np

        off = np.log(self.predict(solution, runs) / self.seconds[runs])
        soft: Array = np.concatenate([off / (1 + (off / SOFT) ** 2) ** 0.25, self._priors * solution])
        return soft

    def solve(self, runs: NDArray[np.int64]) -> Array:
        """The logarithms that explain those runs best."""
        import numpy as np

        solution = np.zeros(len(self._priors))
        damping, step = 1e-2, 1e-4
        errors = self._errors(solution, runs)
        for _ in range(ITERATIONS):
            slopes = np.stack(
                [
                    (self._errors(solution + step * unit, runs) - errors) / step
                    for unit in np.eye(len(solution))
                ],
                axis=1,
            )
            square = slopes.T @ slopes
            move = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), -slopes.T @ errors)
            tried = solution + np.clip(move, -1, 1)
            found = self._errors(tried, runs)
            better = float(errors @ errors - found @ found)
            if better <= 0:
                damping *= 4
                continue
            solution, errors = tried, found
            damping = max(damping / 3, 1e-6)
            if better < 1e-7:
                break
        return solution


def _pass_terms(work: StepWork, part: PassWork) -> tuple[float, ...]:
    """A pass's work in the order of START."""
    return (
        0.0 if work.single else part.layer_flops,
        part.attention_flops,
        part.masked_attention_flops,
        0.0 if work.single else part.head_flops,
        part.adapter_flops,
        part.layer_flops + part.head_flops if work.single else 0.0,
        part.written_bytes,
        part.weight_bytes,
        work.offloaded_bytes,
        part.launches,
        part.quantized_calls,
        part.lora_calls,
        part.liger_calls,
        part.selected_launches,
        part.compiled_layers,
        part.compiled_calls,
    )


def _step_seconds(record: RunRecord) -> float:
    setup = record.setup
    tokens = setup.tokens_per_micro_step * setup.gradient_accumulation_steps
    return tokens / (record.tokens_per_second or 1.0)
