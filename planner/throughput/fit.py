"""Fit of throughput rates to measured runs, and what it leaves unexplained of models that it has not seen.

Rates are positive, so their logarithms are fitted, to the logarithm of the step's time, by damped least
squares (Levenberg 1944, Marquardt 1963) with a loss that grows linearly beyond ten percent: a run disturbed
by its machine does not pull the rest. Machines of one kind have hosts of different speed: each measuring
session has a factor on host time of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from planner.errors import InputError, NotModelledError
from planner.model_spec import ModelSpec
from planner.records import RunRecord
from planner.throughput.rates import OVERLAP, Rates
from planner.throughput.work import StepWork, step_work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

START = {
    "layer_flop_seconds": 1 / 6e14,
    "attention_flop_seconds": 1 / 4e14,
    "head_flop_seconds": 1 / 5e14,
    "adapter_flop_seconds": 1 / 6e14,
    "single_flop_seconds": 1 / 5e13,
    "written_byte_seconds": 1e-12,
    "weight_byte_seconds": 1e-12,
    "offloaded_byte_seconds": 2e-11,
    "launch_seconds": 5e-5,
    "quantized_call_seconds": 1.5e-4,
    "lora_call_seconds": 3e-5,
    "full_call_seconds": 6e-5,
    "compiled_call_seconds": 5e-4,
    "micro_step_seconds": 4e-3,
    "optimizer_byte_seconds": 5e-13,
    "optimizer_tensor_seconds": 2e-5,
}
"""Where the first GPU's fit starts: roughly an H100 and its host."""
GPU_TERMS, HOST_TERMS, OPTIMIZER_TERMS = 8, 6, 2
PRIOR, SESSION_PRIOR = 0.03, 0.5
"""How firmly a logarithm is held at its start, beside a run's weight of one."""
SOFT = 0.1
SESSION_GAP_SECONDS = 240.0
MIN_RUNS = 8
ITERATIONS = 40
QUANTILES = (0.05, 0.95)


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

    `start` is what a rate falls back to that no run tells: another GPU's, scaled; START without it.

    Raises:
        InputError: too few runs.
    """
    import numpy as np

    runs = [record for record in records if record.environment.gpu_id == gpu_id and _timed(record)]
    pairs = [(record, work) for record in runs if (work := _work(record, resolve)) is not None]
    if len(pairs) < MIN_RUNS:
        raise InputError(f"{gpu_id}: {len(pairs)} timed runs are too few to fit rates; {MIN_RUNS} are needed")
    pairs.sort(key=lambda pair: pair[0].created)
    begin = {name: START[name] if start is None else getattr(start, name) for name in START}
    problem = _Problem(pairs, begin)
    everything = np.arange(len(pairs))
    errors = np.zeros(len(pairs))
    models = np.array([record.setup.model for record, _ in pairs])
    for model in sorted(set(models)):
        held = models == model
        if held.all():
            continue
        solution = problem.solve(everything[~held])
        errors[held] = problem.seconds[held] / problem.predict(solution, everything[held]) - 1
    low, high = np.quantile(1 / (1 + errors), QUANTILES)
    solution = problem.solve(everything)
    values = dict(zip(begin, np.exp(solution[: len(begin)]) * list(begin.values()), strict=True))
    rates = Rates(
        gpu=gpu_id,
        **{name: float(value) for name, value in values.items()},
        low=min(1.0, round(float(low), 3)),
        high=max(1.0, round(float(high), 3)),
        record_ids=tuple(sorted(record.id for record, _ in pairs)),
    )
    residuals = tuple(
        SpeedResidual(record_id=record.id, model=record.setup.model, error=float(error))
        for (record, _), error in zip(pairs, errors, strict=True)
    )
    return SpeedFit(rates=rates, residuals=residuals)


def _timed(record: RunRecord) -> bool:
    return record.outcome == "ok" and record.tokens_per_second is not None and record.source == "calibrate"


def _work(record: RunRecord, resolve: Callable[[str], ModelSpec]) -> StepWork | None:
    try:
        return step_work(record.setup, resolve(record.setup.model), padded=record.padded)
    except NotModelledError:
        return None


class _Problem:
    """Runs as a system of equations in the logarithms of rates and of each session's host."""

    def __init__(self, pairs: Sequence[tuple[RunRecord, StepWork]], begin: Mapping[str, float]) -> None:
        import numpy as np

        rows = np.array([_features(work) for _, work in pairs]) * np.array(list(begin.values()))
        self._gpu = rows[:, :GPU_TERMS]
        self._host = rows[:, GPU_TERMS : GPU_TERMS + HOST_TERMS]
        self._optimizer = rows[:, GPU_TERMS + HOST_TERMS :]
        self._accumulated = np.array([r.setup.gradient_accumulation_steps for r, _ in pairs], dtype=float)
        self.seconds = np.array([_step_seconds(record) for record, _ in pairs])
        self._sessions = np.array(_sessions([record for record, _ in pairs]))
        self._priors = np.concatenate(
            [np.full(len(START), PRIOR), np.full(int(self._sessions.max()) + 1, SESSION_PRIOR)]
        )

    def predict(self, solution: Array, runs: NDArray[np.int64]) -> Array:
        """Seconds of a step."""
        import numpy as np

        rate = np.exp(solution)
        gpu = self._gpu[runs] @ rate[:GPU_TERMS]
        host = self._host[runs] @ rate[GPU_TERMS : GPU_TERMS + HOST_TERMS]
        host = host * rate[len(START) + self._sessions[runs]]
        optimizer = self._optimizer[runs] @ rate[GPU_TERMS + HOST_TERMS : len(START)]
        micro = (gpu**OVERLAP + host**OVERLAP) ** (1 / OVERLAP)
        seconds: Array = micro * self._accumulated[runs] + optimizer
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


def _features(work: StepWork) -> tuple[float, ...]:
    """Work in the order of START."""
    return (
        0.0 if work.single else work.layer_flops,
        work.attention_flops,
        0.0 if work.single else work.head_flops,
        work.adapter_flops,
        work.layer_flops + work.head_flops if work.single else 0.0,
        work.written_bytes,
        work.weight_bytes,
        work.offloaded_bytes,
        0.0 if work.compiled_calls else float(work.launches),
        work.quantized_calls,
        work.lora_calls,
        work.full_calls,
        work.compiled_calls,
        1.0,
        work.optimizer_bytes,
        float(work.optimizer_tensors),
    )


def _step_seconds(record: RunRecord) -> float:
    setup = record.setup
    tokens = setup.tokens_per_micro_step * setup.gradient_accumulation_steps
    return tokens / (record.tokens_per_second or 1.0)


def _sessions(records: Sequence[RunRecord]) -> list[int]:
    """Numbers of the measuring sessions of records in the order of time: a pause ends one."""
    found: list[int] = []
    last = None
    for record in records:
        now = datetime.fromisoformat(record.created).timestamp()
        paused = last is not None and now - last > SESSION_GAP_SECONDS
        found.append((found[-1] if found else 0) + int(paused))
        last = now
    return found
