"""Profiles measured in a process of their own, as `vramwise calibrate` and benchmarks/measure.py do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.measuring.profile import Profile, profile_line
from launcher.runs.allocator import measuring_environment
from planner.calibration.records import RunRecord, read_records
from planner.setup.training_setup import TrainingSetup

SECONDS = 200


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a measuring process recorded, how it ended and what it said to that."""

    records: tuple[RunRecord, ...]
    code: int
    errors: str


def profile(*, steps: int = 3, memory_cap_bytes: int | None = None, **setup: Any) -> Profile:
    """A profile of a small model."""
    made = TrainingSetup(**{"model": "qwen2.5-0.5b", "max_length": 512, **setup})
    return Profile(setup=made, steps=steps, memory_cap_bytes=memory_cap_bytes)


def measure(profiles: Sequence[Profile], folder: Path) -> Measured:
    """Measure profiles one after the other in one new process, its allocator set for the first."""
    folder.mkdir(exist_ok=True)
    asked, output = folder / "profiles.jsonl", folder / "records.jsonl"
    asked.write_text("".join(profile_line(one) + "\n" for one in profiles), encoding="utf-8")
    environment = measuring_environment(os.environ, allocator=profiles[0].allocator)
    child = subprocess.run(
        [sys.executable, "-m", "launcher.measuring.profiler", str(asked), str(output), str(SECONDS)],
        env={**environment, "HF_HUB_OFFLINE": "1", "VRAMWISE_DATA_DIR": str(folder / "own")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    records = tuple(read_records(output)) if output.exists() else ()
    said = "\n".join(line for line in child.stdout.splitlines() if '"refused"' in line)
    return Measured(records=records, code=child.returncode, errors=child.stderr[-3000:] + said)


def peak_bytes(record: RunRecord) -> tuple[int, int]:
    """Allocated and reserved at the peak of a step."""
    step = record.phase("step")
    assert step is not None
    return step.allocated_bytes, step.reserved_bytes
