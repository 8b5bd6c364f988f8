"""Time of this tree beside another one: `python -m benchmarks.side_by_side OTHER_TREE`.

Both are run in turn by the same interpreter, so that what else the machine does falls on both. Of each
command the medians are told in seconds by the clock, which is what a person waits and falls with the cores
that share the work, and in seconds of user and system time, children included, which is what is spent; and
the ratios.
Writes benchmarks/results/side_by_side.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
            ("plan, without the longest context", PLAN, (*PLAN, "--no-longest")),
            ("plan, the longest context in ours", PLAN, PLAN),
            ("estimate of 20,000 setups", batch, batch),
            ("compare --gpu 12GB", ("compare", "--gpu", "12GB"), ("compare", "--gpu", "12GB")),
        ):
            found[name] = beside(((other, theirs), (HERE, ours)), args.runs, Path(folder))
            print(name, {kind: times["ratio"] for kind, times in found[name].items()})
    write_result("side_by_side", {"other": _commit(other), "commands": found})


def beside(
    pair: Sequence[tuple[Path, Sequence[str]]], runs: int, folder: Path
) -> dict[str, dict[str, float | list[float]]]:
    """Seconds of two trees, run in turn, after a first run of each that compiles its modules."""
    seconds: tuple[list[Seconds], list[Seconds]] = ([], [])
    for number in range(runs + 1):
        for (tree, command), found in zip(pair, seconds, strict=True):
            took = _seconds(tree, command, folder)
            if number:
                found.append(took)
    return {
        "wall": _compared(*([one.wall for one in found] for found in seconds)),
        "cpu": _compared(*([one.cpu for one in found] for found in seconds)),
    }


class Seconds(NamedTuple):
    """How long a command took: by the clock, and of user and system time."""

    wall: float
    cpu: float


def _compared(other: list[float], own: list[float]) -> dict[str, float | list[float]]:
    theirs, ours = statistics.median(other), statistics.median(own)
    return {
        "other_median_seconds": theirs,
        "median_seconds": ours,
        "ratio": round(ours / theirs, 3),
        "other_seconds": other,
        "seconds": own,
    }


def _seconds(tree: Path, command: Sequence[str], folder: Path) -> Seconds:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, *command],
        check=True,
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Seconds(round(wall, 3), round(cpu, 3))


def _commit(tree: Path) -> str:
    told = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


if __name__ == "__main__":
    main()
