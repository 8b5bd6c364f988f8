"""The equations that rates are fitted by: a run's step as the sum of its work times rates, in logarithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from planner.calibration.records import RunRecord
from planner.throughput.rates import OVERLAP, beside_copies
from planner.throughput.work import PassWork, StepWork

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

START = {
    "layer_flop_seconds": 1 / 6e14,
    "attention_flop_seconds": 1 / 4e14,
    "masked_attention_flop_seconds": 1 / 2e14,
    "wide_masked_attention_flop_seconds": 1 / 2e14,
    "head_flop_seconds": 1 / 5e14,
    "adapter_flop_seconds": 1 / 6e14,
    # TF32: half the rate of 16 bits.
    "single_flop_seconds": 1 / 3e14,
    "written_byte_seconds": 1e-12,
    "weight_byte_seconds": 1e-12,
    "offloaded_byte_seconds": 2e-11,
    "launch_seconds": 3e-5,
    "quantized_call_seconds": 1.5e-4,
    "lora_call_seconds": 3e-5,
    "liger_call_seconds": 1e-4,
    "selected_launch_seconds": 3e-5,
    "eager_layer_seconds": 1e-3,
    "compiled_layer_seconds": 1e-3,
    "compiled_call_seconds": 5e-4,
    "micro_step_seconds": 4e-3,
    "optimizer_byte_seconds": 5e-13,
    "optimizer_call_seconds": 1e-4,
}
"""Where the reference's fit starts: roughly an H100 and its host."""
GPU_TERMS, HOST_TERMS = 10, 8
COPIED = GPU_TERMS - 1
"""Where START has the GPU's copies to the host, which lie beside its work."""
HOST_RATES = ("launch_seconds", "call_seconds", "_layer_seconds", "micro_step_seconds")
PRIOR, COMMON_PRIOR = 0.3, 0.2
"""How firmly a logarithm is held at its start, beside a run's weight of one, and how firmly a factor that all
rates of the GPU or all of the host share. From starts off by 25% a rate, or twofold in all, these forecast
the reference's other runs best, be it from 3 of them or from 15.
"""
SOFT = 0.1
EARLIER_WEIGHT = 0.2
"""Weight of a run from before hosts were timed, beside one whose host was, where there are some of those: its
trainer waited for the GPU after every micro-step. Of 1, 0.5, 0.3, 0.2 and 0.1 the one that leaves the
smallest median error on the timed runs of models left out.
"""
ITERATIONS = 60


class RatesProblem:
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
        self._host = np.array([host_factor(record, host_block_seconds) for record, _ in pairs])
        self._weights = np.array([_weight(record, host_block_seconds) for record, _ in pairs])
        self._accumulated = np.array([r.setup.gradient_accumulation_steps for r, _ in pairs], dtype=float)
        self.seconds = np.array([step_seconds(record) for record, _ in pairs])
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
        weighted = self._weights[runs] * off / (1 + (off / SOFT) ** 2) ** 0.25
        soft: Array = np.concatenate([weighted, self._priors * solution])
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
        part.wide_masked_attention_flops,
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
        part.eager_layers,
        part.compiled_layers,
        part.compiled_calls,
    )


def host_factor(record: RunRecord, host_block_seconds: float | None) -> float:
    """How many times as long as that the run's host took for an eager block; 1 where it was not timed."""
    if record.host_block_seconds is None or host_block_seconds is None:
        return 1.0
    return record.host_block_seconds / host_block_seconds


def as_launched(record: RunRecord) -> bool:
    """Whether the run's trainer was today's; measuring runs with an earlier one did not time their host."""
    return record.host_block_seconds is not None or record.source != "calibrate"


def _weight(record: RunRecord, host_block_seconds: float | None) -> float:
    return 1.0 if host_block_seconds is None or as_launched(record) else EARLIER_WEIGHT


def step_seconds(record: RunRecord) -> float:
    """Seconds of an optimizer step, steady state."""
    setup = record.setup
    tokens = setup.tokens_per_micro_step * setup.gradient_accumulation_steps
    return tokens / (record.tokens_per_second or 1.0)
