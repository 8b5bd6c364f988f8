"""How right and fast the two ways of telling reserved memory are: `python -m benchmarks.allocator_replay`.

Every committed record of an uncapped run is predicted by the replay of torch's allocator and by the fitted
reserve, each with its model held out of what is fitted. Writes benchmarks/results/allocator_replay.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.results import write_result
from planner.accuracy import shipped_records
from planner.calibration import Residual, calibrate, usable_records
from planner.gpu_catalog import gpu_catalog
from planner.memory import estimate_memory
from planner.memory.step_replay import forget_replays
from planner.model_catalog import load_shipped
from planner.records import RunRecord

FIGURES: dict[str, Callable[[Residual], float | None]] = {
    "allocated": lambda residual: residual.allocated_error,
    "reserved": lambda residual: residual.reserved_error,
    "process": lambda residual: residual.process_error,
}


def errors(residuals: Sequence[Residual]) -> dict[str, Any]:
    """Median, 95th percentile and worst size of each figure's error, and its mean, in percent."""
    found = {}
    for figure, of in FIGURES.items():
        values = [value for value in map(of, residuals) if value is not None]
        sizes = sorted(map(abs, values))
        found[figure] = {
            "runs": len(values),
            "median": round(100 * statistics.median(sizes), 4),
            "percentile_95": round(100 * sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))], 3),
            "worst": round(100 * max(values, key=abs), 3),
            "lowest": round(100 * min(values), 3),
            "bias": round(100 * statistics.fmean(values), 4),
        }
    return found


def seconds(records: Sequence[RunRecord], *, replay: bool) -> list[float]:
    """Time of each record's estimate, the model looked up and its layers' programs made before."""
    gpu = gpu_catalog().get(records[0].environment.gpu_id)
    found = []
    for record in records:
        model = load_shipped(record.setup.model)
        estimate_memory(record.setup, model, gpu=gpu, padded=record.padded, replay=replay)
        forget_replays()
        begun = time.perf_counter()
        estimate_memory(record.setup, model, gpu=gpu, padded=record.padded, replay=replay)
        found.append(time.perf_counter() - begun)
    return found


def main() -> None:
    records = shipped_records()
    gpu = gpu_catalog().get(records[0].environment.gpu_id)
    found = calibrate(records, gpu, load_shipped, name=gpu.id)
    usable = usable_records(records, gpu, load_shipped)
    modes = {}
    for name, residuals, replay in (
        ("allocator replayed", found.residuals, True),
        ("reserve fitted", found.fitted_residuals, False),
    ):
        took = seconds(usable, replay=replay)
        modes[name] = {
            "error_percent": errors(residuals),
            "seconds_median": round(statistics.median(took), 6),
            "seconds_longest": round(max(took), 6),
        }
        print(name, modes[name])
    fitted = {residual.record_id: residual for residual in found.fitted_residuals}
    write_result(
        "allocator_replay",
        {
            "gpu": gpu.id,
            "modes": modes,
            "runs": [
                {
                    "record": residual.record_id,
                    "model": residual.model,
                    "replayed_reserved_error": round(residual.reserved_error, 5),
                    "fitted_reserved_error": round(fitted[residual.record_id].reserved_error, 5),
                }
                for residual in found.residuals
            ],
        },
    )


if __name__ == "__main__":
    main()
