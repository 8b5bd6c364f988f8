"""Wall time of a cold `plan`, without data and with 100,000 chats.

    python -m benchmarks.cold_start [--plan PROGRAM]

Writes benchmarks/results/cold_start.json. Take it in an environment with the base install alone. The chats
(250 MB) are read once before: what is timed is the start, the search and the rest of the plan, with their
lengths remembered; the first reading stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import write_result

RUNS = 10
ARGUMENTS = ("--model", "qwen2.5-14b", "--gpu", "16GB")
BAR_SECONDS = 0.35
CHATS, MEDIAN_TOKENS, SIGMA, LONGEST = 100_000, 400, 1.0, 4000
BYTES_A_TOKEN = 4
CHATS_BAR_SECONDS = 0.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, default=Path(sys.executable).with_name("plan"))
    program = str(parser.parse_args().plan)
    python = [_seconds([sys.executable, "-c", "pass"]) for _ in range(RUNS)]
    bare = _timed([program, *ARGUMENTS], BAR_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        write_chats(data)
        command = [program, *ARGUMENTS, "--data", str(data)]
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        first = _seconds(command, environment)
        chats = _timed(command, CHATS_BAR_SECONDS, environment)
    write_result(
        "cold_start",
        {
            "command": " ".join(["plan", *ARGUMENTS]),
            **bare,
            "python_start_median_seconds": round(statistics.median(python), 4),
            "with_100000_chats": {**chats, "first_reading_seconds": round(first, 2)},
        },
    )
    print(f"median {bare['median_seconds']} s, with chats {chats['median_seconds']} s, first {first:.2f} s")
    late = (
        bare["median_seconds"] > BAR_SECONDS,
        chats["median_seconds"] > CHATS_BAR_SECONDS,
    )
    return int(any(late))


def write_chats(path: Path) -> None:
    """Lengths of a lognormal distribution, as many bytes a token as planning takes a token to have."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(CHATS):
            tokens = min(LONGEST, int(math.exp(generator.gauss(math.log(MEDIAN_TOKENS), SIGMA))) + 10)
            text = "word " * (tokens * BYTES_A_TOKEN // 5)
            half = len(text) // 2
            messages = [
                {"role": "user", "content": text[:half]},
                {"role": "assistant", "content": text[half:]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def _timed(
    command: list[str], bar_seconds: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    seconds = [_seconds(command, environment) for _ in range(RUNS + 1)][1:]
    return {
        "median_seconds": round(statistics.median(seconds), 4),
        "seconds": [round(value, 4) for value in seconds],
        "bar_seconds": bar_seconds,
    }


def _seconds(command: list[str], environment: dict[str, str] | None = None) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
