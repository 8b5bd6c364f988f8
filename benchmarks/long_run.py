"""CPU time and memory to list, follow and finish a run of 10^6 steps, beside a run of 10^4.

    python -m benchmarks.long_run [--steps 1000000]

Writes benchmarks/results/long_run.json. Each is a process of its own, so that its memory is its peak alone;
CPU time, since on a loaded machine wall time says nothing. The start of Python and imports is in each, and
stands beside them. The 10^6 steps are in two attempts, whose second began in the middle of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import write_result
from launcher.runs.attempts import Attempt, add_attempt, first_attempt
from launcher.runs.events import AttemptEvent, CheckpointEvent, EndEvent, Event, LogEvent, StartEvent, to_line
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.training_job import TrainingJob
from planner.setup.training_setup import TrainingSetup

STEPS, FEW = 10**6, 10**4
LIST_BAR_SECONDS = 0.5
"""CPU seconds that `runs list` may take for a run, beside the start of Python."""
MEMORY_BAR_BYTES = 32 * 2**20
"""That the long run may take more than the short one."""
COMMANDS = {
    "start": "pass",
    "list": "print(status(folder.path))",
    "follow": (
        "seen = []\n"
        "looks = lambda: bool(seen.append(1)) or len(seen) < 20\n"
        "RunView(folder, Interrupts(), looks, False).show()"
    ),
    "finish": "finish(folder, status(folder.path), None, out=sys.stdout, store=False)",
}
PREAMBLE = """
import sys
from pathlib import Path
from launcher.commands.follow import RunView, finish
from launcher.commands.interrupts import Interrupts
from launcher.runs.folder import RunFolder
from launcher.runs.state import status
folder = RunFolder(Path(sys.argv[1]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as root:
        long, short = (write_run(Path(root), count) for count in (steps, FEW))
        found = {
            name: {"long": measured(code, long), "short": measured(code, short)}
            for name, code in COMMANDS.items()
        }
        size = long.events.stat().st_size
    start = found["start"]["long"]["cpu_seconds"]
    listed = found["list"]["long"]["cpu_seconds"] - start
    grown = {name: one["long"]["peak_bytes"] - one["short"]["peak_bytes"] for name, one in found.items()}
    passed = listed <= LIST_BAR_SECONDS and max(grown.values()) <= MEMORY_BAR_BYTES
    write_result(
        "long_run",
        {
            "steps": steps,
            "event_file_bytes": size,
            "list_cpu_seconds": round(listed, 3),
            "list_bar_seconds": LIST_BAR_SECONDS,
            "memory_bar_bytes": MEMORY_BAR_BYTES,
            "grown_bytes": grown,
            "processes": found,
            "passed": passed,
        },
    )
    print(json.dumps(found, indent=2))
    print(f"list: {listed:.2f} s of CPU, {max(grown.values()) / 2**20:.0f} MiB more at most")
    return 0 if passed else 1


def write_run(root: Path, steps: int, loss: Callable[[int], float] = lambda _: random.random()) -> RunFolder:
    """A run of so many logged steps, two attempts, and a checkpoint every thousand steps."""
    job = TrainingJob(
        setup=TrainingSetup(model="demo", max_length=64),
        model_source="m",
        data_path="d.jsonl",
        max_steps=2 * steps,
    )
    folder = create_run_folder(root, job, name=f"run-{steps}")
    first = first_attempt(job)
    second = Attempt(
        number=2,
        reason="resume",
        from_step=steps // 2,
        setup=job.setup,
        num_train_epochs=job.num_train_epochs,
        max_steps=job.max_steps,
    )
    for attempt in (first, second):
        add_attempt(folder.attempts, attempt)
    with folder.events.open("w", encoding="utf-8") as file:
        for attempt, begin, end in ((first, 0, steps // 2), (second, steps // 2, steps)):
            for event in _begin(attempt, 2 * steps):
                file.write(to_line(event))
            for step in range(begin + 1, end + 1):
                file.write(to_line(_log(step, loss(step))))
                if step % 1000 == 0:
                    file.write(to_line(CheckpointEvent(time=2.0, step=step, path=f"/c/checkpoint-{step}")))
            state = "killed" if attempt is first else "stopped"
            file.write(to_line(EndEvent(time=3.0, state=state, message="", step=end)))
    return folder


def _begin(attempt: Attempt, total: int) -> tuple[Event, Event]:
    told = AttemptEvent(time=1.0, number=attempt.number, reason=attempt.reason, from_step=attempt.from_step)
    return told, StartEvent(time=1.0, total_steps=total, environment={}, first_step=attempt.from_step)


def _log(step: int, loss: float) -> LogEvent:
    return LogEvent(
        time=1.7e9 + step,
        step=step,
        loss=loss,
        learning_rate=1e-4 * random.random(),
        grad_norm=random.random(),
        tokens_per_second=1500 * random.random(),
        step_seconds=random.random(),
        num_tokens=step * 4096,
        epoch=step / 1000,
    )


def measured(code: str, folder: RunFolder) -> dict[str, Any]:
    """CPU and wall seconds, and the peak of resident memory, of a process that runs this code on a run."""
    begun = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(folder.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, code_of_end, used = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(code_of_end) not in (0, 130):
        raise SystemExit(f"{code!r} ended with {os.waitstatus_to_exitcode(code_of_end)}")
    return {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
        "wall_seconds": round(time.monotonic() - begun, 3),
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
