"""Fit the shipped memory coefficients to the committed records: `python -m benchmarks.fit_memory [GPU ...]`.

Without names every GPU with enough records is fitted. Writes profiles/calibration and prints the errors with
each model left out.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence

from planner.base.data_files import PROFILES, write_atomically
from planner.calibration.accuracy import shipped_records
from planner.calibration.memory_fit import MIN_RECORDS, calibrate
from planner.gpus.catalog import gpu_catalog
from planner.memory.measured.files import coefficients_name
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS


def main(names: Sequence[str]) -> None:
    """Fit, write and print."""
    records = shipped_records()
    counts = Counter(record.environment.gpu_id for record in records)
    for gpu_id in names or [gpu for gpu, count in counts.items() if count >= MIN_RECORDS]:
        for allocator in ALLOCATORS:
            gpu = gpu_catalog().get(gpu_id)
            fit = calibrate(records, gpu, load_shipped, name=gpu_id, allocator=allocator)
            text = json.dumps(fit.coefficients.to_dict(), indent=1) + "\n"
            write_atomically(PROFILES / "calibration" / coefficients_name(gpu_id, allocator), text)
            sizes = [abs(residual.reserved_error) for residual in fit.residuals]
            middle = f"{statistics.median(sizes):.2%}" if sizes else "none"
            print(f"{gpu_id}, {allocator}: {len(sizes)} runs, reserved: median error {middle}")


if __name__ == "__main__":
    main(sys.argv[1:])
