"""CPU time of this tree beside another one: `python -m benchmarks.side_by_side OTHER_TREE`.

Both are run in turn by the same interpreter, so that what else the machine does falls on both; what counts is
the ratio of the medians of user and system seconds, children included. Writes
benchmarks/results/side_by_side.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.estimate_throughput import distinct_lines
from benchmarks.results import write_result

RUNS = 5
HERE = Path(__file__).parent.parent
PLAN = ("plan", "--model", "qwen2.5-14b", "--gpu", "16GB")
_PROGRAM = "import sys; from launcher.cli import main; main(sys.argv[1:])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="a checkout of the release to compare with")
    parser.add_argument("--runs", type=int, default=RUNS)
    args = parser.parse_args()
    other: Path = args.other.resolve()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        setups = Path(folder) / "setups.jsonl"
        setups.write_text("".join(line + "\n" for line in distinct_lines()), encoding="utf-8")
        batch = ("estimate", "--gpu", "rtx-4090", "--setups", str(setups), "--json")
        for name, theirs, ours in (
            ("plan", PLAN, PLAN),
            ("plan, the longest context in ours", PLAN, (*PLAN, "--longest")),
            ("estimate of 20,000 setups", batch, batch),
            ("compare --gpu 12GB", ("compare", "--gpu", "12GB"), ("compare", "--gpu", "12GB")),
        ):
            found[name] = beside(((other, theirs), (HERE, ours)), args.runs, Path(folder))
            print(name, found[name])
    write_result("side_by_side", {"other": _commit(other), "commands": found})


def beside(
    pair: Sequence[tuple[Path, Sequence[str]]], runs: int, folder: Path
) -> dict[str, float | list[float]]:
    """CPU seconds of two trees, run in turn, after a first run of each that compiles its modules."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for (tree, command), found in zip(pair, seconds, strict=True):
            took = _cpu_seconds(tree, command, folder)
            if number:
                found.append(round(took, 3))
    other, own = (statistics.median(found) for found in seconds)
    return {
        "other_median_seconds": other,
        "median_seconds": own,
        "ratio": round(own / other, 3),
        "other_seconds": seconds[0],
        "seconds": seconds[1],
    }


def _cpu_seconds(tree: Path, command: Sequence[str], folder: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, *command],
        check=True,
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _commit(tree: Path) -> str:
    told = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


if __name__ == "__main__":
    main()
