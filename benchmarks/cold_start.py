"""Wall time of a cold `plan`: `python -m benchmarks.cold_start [--plan PROGRAM]`.

Writes benchmarks/results/cold_start.json. Take it in an environment with the base install alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.results import write_result

RUNS = 10
ARGUMENTS = ("--model", "qwen2.5-14b", "--gpu", "16GB")
BAR_SECONDS = 0.35


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, default=Path(sys.executable).with_name("plan"))
    program = parser.parse_args().plan
    seconds = [_seconds([str(program), *ARGUMENTS]) for _ in range(RUNS + 1)][1:]
    python = [_seconds([sys.executable, "-c", "pass"]) for _ in range(RUNS)]
    median = statistics.median(seconds)
    write_result(
        "cold_start",
        {
            "command": " ".join(["plan", *ARGUMENTS]),
            "median_seconds": round(median, 4),
            "seconds": [round(value, 4) for value in seconds],
            "python_start_median_seconds": round(statistics.median(python), 4),
            "bar_seconds": BAR_SECONDS,
        },
    )
    print(f"median {median:.3f} s of {RUNS}, bar {BAR_SECONDS} s")
    return int(median > BAR_SECONDS)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
