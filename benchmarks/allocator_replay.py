"""How right and fast the two ways of telling reserved memory are: `python -m benchmarks.allocator_replay`.

Every usable record is predicted by the replay of the allocator that it had and by the fitted reserve, each
with its model held out of what is fitted. Writes benchmarks/results/allocator_replay.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.results import write_result
from planner.calibration.accuracy import shipped_records
from planner.calibration.memory_fit import Residual, calibrate
from planner.calibration.records import RunRecord
from planner.calibration.samples import samples_of
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.memory import estimate_memory
from planner.memory.step import replay as remembering
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS
from planner.setup.run import TrainingRun

GPU = "h100-80gb"
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
    """Time of each record's estimate, its layers' programs made before."""
    found = []
    for record in records:
        _estimate(record, replay=replay)
        remembering._WHOLE.clear()
        begun = time.perf_counter()
        _estimate(record, replay=replay)
        found.append(time.perf_counter() - begun)
    return found


def _estimate(record: RunRecord, *, replay: bool) -> None:
    gpu, model = gpu_catalog().get(record.environment.gpu_id), load_shipped(record.setup.model)
    estimate_memory(
        TrainingRun(setup=record.setup, model=model, padded=record.padded),
        gpu=gpu,
        replay=replay,
        allocator=record.allocator,
    )


def compare(gpu: GpuSpec, allocator: str) -> dict[str, Any]:
    """Errors and times of both ways, over the runs of a GPU with one of torch's allocators."""
    records = shipped_records()
    found = calibrate(records, gpu, load_shipped, name=gpu.id, allocator=allocator)
    samples = samples_of(records, gpu, load_shipped)
    usable = [sample.record for sample in samples if sample.record.allocator == allocator]
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
        print(allocator, name, modes[name])
    fitted = {residual.record_id: residual for residual in found.fitted_residuals}
    runs = [
        {
            "record": residual.record_id,
            "model": residual.model,
            "replayed_reserved_error": round(residual.reserved_error, 5),
            "fitted_reserved_error": round(fitted[residual.record_id].reserved_error, 5),
        }
        for residual in found.residuals
    ]
    return {"modes": modes, "runs": runs}


def main() -> None:
    gpu = gpu_catalog().get(GPU)
    write_result(
        "allocator_replay",
        {"gpu": GPU, "allocators": {allocator: compare(gpu, allocator) for allocator in ALLOCATORS}},
    )


if __name__ == "__main__":
    main()
