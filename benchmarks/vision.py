"""Train vision-language models of the published shapes, with random weights, on the drawn images on this GPU.

    python -m benchmarks.vision RECORDS.jsonl [--seconds N]

Each is 20 optimizer steps of QLoRA with the tower frozen, in a process of its own: the images as they were
drawn, and four times as large. Records have what was predicted beside what was measured; the losses of all
steps go beside them, into RECORDS.losses.json. Prints a line each. Needs the training stack and Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.measuring.profile import Profile, profile_line, read_profiles
from launcher.runs.allocator import measuring_environment
from planner.setup.training_setup import TrainingSetup

STEPS = 20
WARM_UP = 2
RUNS: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-vl-7b", "scale": 1, "per_device_train_batch_size": 8},
    {"model": "gemma-3-4b-vision", "scale": 1, "per_device_train_batch_size": 8},
    {"model": "qwen2.5-vl-7b", "scale": 4, "per_device_train_batch_size": 2},
    {"model": "qwen2.5-vl-7b", "scale": 4, "per_device_train_batch_size": 2, "vision_tower": "4bit"},
    {
        "model": "gemma-3-4b-vision",
        "scale": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "vision_tower": "4bit",
    },
    {
        "model": "qwen2.5-vl-7b",
        "scale": 2,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
    },
)
"""In the order of what they say: the first two are the bar's."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return measure(arguments.child, arguments.records)
    end, slowest = time.monotonic() + arguments.seconds, 0.0
    failed = 0
    for number, run in enumerate(RUNS):
        begun = time.monotonic()
        if begun + slowest > end:
            print(f"{len(RUNS) - number} runs are left out: no time", flush=True)
            break
        path = arguments.records.with_suffix(f".{number}.profile.json")
        path.write_text(profile_line(profile_of(run)) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.vision", str(arguments.records), "--child", str(path)]
        environment = measuring_environment(os.environ, allocator=None)
        failed += subprocess.run(command, env=environment, check=False).returncode != 0
        slowest = max(slowest, time.monotonic() - begun)
    return 1 if failed else 0


def profile_of(run: dict[str, Any]) -> Profile:
    """The profile of a run, whose sequences are as long and have as many patches as the images make them."""
    from launcher.measuring.measured_images import drawn_at
    from launcher.measuring.measured_run import load_config

    knobs = {key: value for key, value in run.items() if key != "scale"}
    drawn = drawn_at(run["model"], load_config(run["model"]), run["scale"])
    setup = TrainingSetup(
        max_length=drawn.stats.longest,
        image_patches=drawn.stats.image_patches,
        optim="adamw_8bit",
        **knobs,
    )
    lengths = tuple(len(ids) for ids in drawn.rows["input_ids"])
    return Profile(setup=setup, steps=STEPS - WARM_UP, lengths=lengths)


def measure(path: Path, records: Path) -> int:
    """Measure one profile in this process, and tell."""
    from launcher.measuring.profiler import Profiler
    from planner.calibration.records import append_record

    profile = read_profiles(path)[0]
    profiler = Profiler()
    record = profiler.measure(profile)
    append_record(records, record)
    step = next((phase for phase in record.phases if phase.name == "step"), None)
    found = {
        "id": record.id,
        "model": profile.setup.model,
        "outcome": record.outcome,
        "losses": [round(loss, 4) for loss in profiler.losses],
        "loss_fell": bool(profiler.losses) and sum(profiler.losses[-3:]) / 3 < profiler.losses[0],
    }
    if step is not None and record.predicted is not None:
        for name in ("allocated", "reserved", "process"):
            measured, told = getattr(step, f"{name}_bytes"), getattr(record.predicted, f"{name}_bytes")
            found[name] = {"measured": measured, "predicted": told}
            if measured:
                found[name]["off_percent"] = round(100 * (told / measured - 1), 3)
    losses = records.with_suffix(".losses.json")
    known = json.loads(losses.read_text(encoding="utf-8")) if losses.exists() else []
    losses.write_text(json.dumps([*known, found], indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
