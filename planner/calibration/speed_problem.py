"""The equations that rates are fitted by: a run's step as the sum of its work times rates, in logarithms."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from statistics import median
from typing import TYPE_CHECKING

from planner.calibration.records import RunRecord
from planner.throughput.by_kind import ByKind
from planner.throughput.rates import OVERLAP, beside_copies
from planner.throughput.work import StepWork
from planner.throughput.work_kinds import WORK_KINDS, WorkKind, kinds_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

START = ByKind(numbers=tuple(kind.start for kind in WORK_KINDS))
"""Where the reference's fit starts: roughly an H100 and its host."""
_GPU, _COPIES = kinds_of("pass", "matrix", "traffic"), kinds_of("pass", "copies")
_HOST, _BESIDE = kinds_of("pass", "host"), kinds_of("micro_step", "host")
_MOVED, _CALLED = kinds_of("optimizer_step", "traffic"), kinds_of("optimizer_step", "host")
_GROUPS = (_GPU, _COPIES, _HOST, _BESIDE, _MOVED, _CALLED)
UNKNOWNS: tuple[WorkKind, ...] = tuple(itertools.chain(*_GROUPS))
"""Every kind of work, those together whose seconds are added up."""
_ENDS = tuple(itertools.accumulate(map(len, _GROUPS)))
_SLICES = tuple(slice(end - len(group), end) for group, end in zip(_GROUPS, _ENDS, strict=True))
PRIOR, COMMON_PRIOR = 0.3, 0.2
"""How firmly a logarithm is held at its start, beside a run's weight of one, and how firmly a factor that all
rates of the GPU or all of the host share. From starts off by 25% a rate, or twofold in all, these forecast
the reference's other runs best, be it from 3 of them or from 15.
"""
SOFT = 0.1
WARM_UP_STEPS = 2
"""Steps of a record that are not timed (launcher/measuring/measured_run.py)."""
EARLIER_WEIGHT = 0.2
"""Weight of a run from before hosts were timed, beside one whose host was, where there are some of those: its
trainer waited for the GPU after every micro-step. Of 1, 0.5, 0.3, 0.2 and 0.1 the one that leaves the
smallest median error on the timed runs of models left out.
"""
UPDATE_WEIGHT = 0.3
"""Weight of a run's update, which was timed apart, beside the step that it is a part of: it tells what
optimizers take, which steps hide."""
ITERATIONS = 60


class RatesProblem:
    """Runs as equations in the logarithms of rates, relative to where the fit starts, and in those
    of what the GPU's rates, and the host's, have in common. Host rates are those of a host that takes so long
    for an eager block. `told` are the kinds of work that are held `firmness` times as firmly as the others.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[RunRecord, StepWork]],
        begin: ByKind,
        firmness: float,
        host_block_seconds: float | None,
        told: Collection[str] = (),
    ) -> None:
        import numpy as np

        self._begin = begin
        works = [work for _, work in pairs]
        self._passes = [
            self._seconds([work.forward for work in works], _GPU + _COPIES + _HOST),
            self._seconds([work.backward for work in works], _GPU + _COPIES + _HOST),
        ]
        self._beside = self._seconds([work.micro_step for work in works], _BESIDE)
        self._moved = self._seconds([work.optimizer_step for work in works], _MOVED)
        self._called = self._seconds([work.optimizer_step for work in works], _CALLED)
        self._host = np.array([host_factor(record, host_block_seconds) for record, _ in pairs])
        self._weights = np.array([_weight(record, host_block_seconds) for record, _ in pairs])
        self._accumulated = np.array([r.setup.gradient_accumulation_steps for r, _ in pairs], dtype=float)
        self.seconds = np.array([step_seconds(record) for record, _ in pairs])
        updates = [update_seconds(record) for record, _ in pairs]
        self._timed_updates = np.array([UPDATE_WEIGHT if one else 0.0 for one in updates])
        self._updates = np.array([one or 1.0 for one in updates])
        of_host = np.array([kind.side == "host" for kind in UNKNOWNS])
        self._shared = np.stack([~of_host, of_host], axis=1).astype(float)
        own = [PRIOR * (firmness if kind.name in told else 1.0) for kind in UNKNOWNS]
        self._priors = np.array([*own, *[COMMON_PRIOR * firmness] * 2])

    def _seconds(self, works: Sequence[ByKind], kinds: Sequence[WorkKind]) -> Array:
        """Seconds of each work's kinds at the rates that the fit starts from."""
        import numpy as np

        amounts = np.array([[work[kind.name] for kind in kinds] for work in works], dtype=float)
        seconds: Array = amounts * np.array([self._begin[kind.name] for kind in kinds])
        return seconds

    def factors(self, solution: Array) -> Array:
        """Logarithms of each rate's whole factor, in the order of UNKNOWNS."""
        whole: Array = solution[: len(UNKNOWNS)] + self._shared @ solution[len(UNKNOWNS) :]
        return whole

    def rates(self, solution: Array) -> ByKind:
        """Seconds for a unit of each kind of work."""
        import numpy as np

        found = zip(UNKNOWNS, np.exp(self.factors(solution)), strict=True)
        return ByKind.of({kind.name: float(factor * self._begin[kind.name]) for kind, factor in found})

    def predict(self, solution: Array, runs: NDArray[np.int64]) -> Array:
        """Seconds of a step."""
        import numpy as np

        rate = np.exp(self.factors(solution))
        gpu, copies, host, beside, *_ = _SLICES
        slower = self._host[runs]
        micro = self._beside[runs] @ rate[beside] * slower
        for terms in self._passes:
            computed = beside_copies(terms[runs, gpu] @ rate[gpu], terms[runs, copies] @ rate[copies])
            launched = terms[runs, host] @ rate[host] * slower
            micro = micro + (computed**OVERLAP + launched**OVERLAP) ** (1 / OVERLAP)
        seconds: Array = micro * self._accumulated[runs] + self.predict_update(solution, runs)
        return seconds

    def predict_update(self, solution: Array, runs: NDArray[np.int64]) -> Array:
        """Seconds of the optimizer's part of a step."""
        import numpy as np

        rate = np.exp(self.factors(solution))
        moved, called = _SLICES[_GROUPS.index(_MOVED)], _SLICES[_GROUPS.index(_CALLED)]
        computed, launched = self._moved[runs] @ rate[moved], self._called[runs] @ rate[called]
        seconds: Array = (computed**OVERLAP + (launched * self._host[runs]) ** OVERLAP) ** (1 / OVERLAP)
        return seconds

    def _errors(self, solution: Array, runs: NDArray[np.int64]) -> Array:
        import numpy as np

        off = np.log(self.predict(solution, runs) / self.seconds[runs])
        update = np.log(self.predict_update(solution, runs) / self._updates[runs])
        weights = self._weights[runs]
        told = (_soft(off) * weights, _soft(update) * weights * self._timed_updates[runs])
        soft: Array = np.concatenate([*told, self._priors * solution])
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


def _soft(off: Array) -> Array:
    """Deviations that grow as a square root from SOFT on."""
    found: Array = off / (1 + (off / SOFT) ** 2) ** 0.25
    return found


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


def update_seconds(record: RunRecord) -> float | None:
    """Seconds of an update, steady state; None where none was timed."""
    found = record.update_seconds[WARM_UP_STEPS:]
    return median(found) if found and median(found) > 0 else None
