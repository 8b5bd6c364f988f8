"""Measure models that are described by tracing, each at two lengths, with random weights on this GPU.

    python -m benchmarks.traced_families RECORDS.jsonl [--seconds N] [--only WORD ...]

Records are appended as they come (benchmarks/measure.py); what failed is told in RECORDS.failed.txt with the
end of its log, and the next setup is measured. Started again, it goes on where it was. Their predictions are
the catalog's traces replayed: --compare prints them beside what was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import measure_file
from launcher.measuring.profile import Profile, profile_line
from planner.calibration.records import read_records
from planner.memory import estimate_memory
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LINEAR = (*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj")
KEPT = {"gradient_checkpointing": False}
# Models whose time for a step is long come last, longer runs of each after its shorter one.
RUNS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("gpt-oss-20b", (1024, 4096), {"experts": "4bit"}),
    ("deepseek-v2-lite", (1024, 4096), {"experts": "4bit", "target_modules": LATENT}),
    ("granite-4.0-h-micro", (1024, 2048), {}),
    ("qwen3.5-4b", (1024, 2048), {}),
    ("glm-4.5-air", (1024, 4096), {"experts": "4bit", "target_modules": ATTENTION}),
    ("qwen3-next-80b-a3b", (1024, 2048), {"experts": "4bit", "target_modules": LINEAR}),
    ("llama-4-scout", (1024, 2048), {"experts": "4bit", "target_modules": ATTENTION}),
    ("granite-4.0-h-tiny", (1024, 2048), {"experts": "4bit"}),
    ("gemma-4-31b", (1024, 2048), {}),
    ("deepseek-v2-lite", (2048,), {"experts": "4bit", "lora_r": 8}),
    ("gpt-oss-20b", (2048,), {"experts": "4bit", **KEPT}),
    ("qwen3.5-9b", (2048,), KEPT),
)
STEPS = 2
GIB = 2**30


def profiles() -> Iterator[Profile]:
    """What is measured, in order."""
    for model, lengths, knobs in RUNS:
        for length in lengths:
            setup = TrainingSetup(
                model=model,
                max_length=length,
                per_device_train_batch_size=1,
                optim="adamw_torch_fused",
                **{"method": "qlora", **knobs},
            )
            yield Profile(setup=setup, steps=STEPS)


def compare(records: Path) -> Iterator[str]:
    """Lines: what was measured of each record, and today's prediction beside it."""
    for record in read_records(records):
        step = next((phase for phase in record.phases if phase.name == "step"), None)
        if step is None:
            continue
        run = TrainingRun(setup=record.setup, model=load_shipped(record.setup.model), padded=record.padded)
        found = estimate_memory(run, replay=True)
        figures = [
            f"{name} {getattr(step, name) / GIB:.3f} GiB, predicted "
            f"{100 * (getattr(found, name) / getattr(step, name) - 1):+.2f}%"
            for name in ("allocated_bytes", "reserved_bytes")
        ]
        yield f"{record.setup.model} at {record.setup.max_length}: {'; '.join(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--compare", action="store_true", help="measure nothing: print what is recorded")
    arguments = parser.parse_args()
    if not arguments.compare:
        wanted = [
            profile_line(profile)
            for profile in profiles()
            if not arguments.only or any(word in profile.setup.model for word in arguments.only)
        ]
        path = arguments.records.with_suffix(".profiles.jsonl")
        path.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        measure_file(path, arguments.records, arguments.seconds)
    for line in compare(arguments.records):
        print(line)


if __name__ == "__main__":
    main()
