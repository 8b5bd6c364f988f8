"""Fit the shipped throughput rates to the committed records: `python -m benchmarks.fit_rates [GPU ...]`.

Without names every GPU with enough records is fitted, the reference first. Writes
profiles/calibration/throughput and prints errors with each model left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from planner.base.data_files import PROFILES, write_atomically
from planner.calibration.accuracy import shipped_records
from planner.calibration.speed_fit import MIN_RUNS, REFERENCE_GPU, fit_rates, start_for
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import load_shipped
from planner.throughput.rates import known_rates

FOLDER = PROFILES / "calibration" / "throughput"


def main(names: Sequence[str]) -> None:
    """Fit, write and print."""
    records = shipped_records()
    counts: dict[str, int] = {}
    for record in records:
        counts[record.environment.gpu_id] = counts.get(record.environment.gpu_id, 0) + 1
    found = list(names) or [gpu for gpu, count in counts.items() if count >= MIN_RUNS]
    for gpu_id in sorted(found, key=lambda name: name != REFERENCE_GPU):
        known_rates.cache_clear()
        fit = fit_rates(records, gpu_id, load_shipped, start=start_for(gpu_catalog().get(gpu_id)))
        text = json.dumps(fit.rates.to_dict(), indent=1) + "\n"
        write_atomically(FOLDER / f"{gpu_id}.json", text)
        sizes = sorted(abs(residual.error) for residual in fit.residuals)
        median, high = sizes[len(sizes) // 2], sizes[int(0.9 * len(sizes))]
        print(f"{gpu_id}: {len(sizes)} runs, median error {median:.1%}, 90th percentile {high:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
