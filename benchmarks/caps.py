"""Whether what is said to fit does, and what is said not to fit runs out: torch's allocator as the referee.

    python -m benchmarks.caps make FOLDER
    python -m benchmarks.caps judge RECORDS

`make` writes profiles for a large GPU whose allocator is capped at what a smaller card would leave it:
fits.jsonl (the plan's own choice), tight.jsonl (its longest length whose upper end fits) and over.jsonl (the
shortest length that is predicted to need 8% more than the card leaves). `judge` says what became of them.

Measure them with benchmarks.measure. The context and the paged optimizer's managed memory lie outside the
allocator: they are taken off its cap.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.measuring.profile import Profile, profile_line
from planner.calibration.records import read_records
from planner.gpus.catalog import gpu_catalog
from planner.memory import MemoryBreakdown, estimate_memory
from planner.models.catalog import load_shipped
from planner.planning.make_plan import make_plan
from planner.setup.cuda_allocator import machine_allocator
from planner.setup.request import PlanRequest
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

MEASURED_ON = "h100-80gb"
OVER = 1.08
MAX_LENGTH_GROWTH = 16
PAIRS: tuple[tuple[str, str, tuple[tuple[str, object], ...]], ...] = (
    ("llama-3.2-3b", "rtx-3060-12gb", ()),
    ("qwen3-4b", "rtx-3060-12gb", ()),
    ("llama-3.1-8b", "rtx-3060-12gb", ()),
    ("qwen2.5-14b", "16GB", ()),
    ("llama-3.1-8b", "16GB", ()),
    ("gemma-2-9b", "16GB", (("max_length", 2048),)),
    ("mistral-nemo-12b", "16GB", ()),
    ("qwen3-14b", "rtx-3090", ()),
    ("phi-4", "rtx-3090", ()),
    ("mistral-small-24b", "rtx-3090", (("max_length", 1024),)),
    ("qwen2.5-32b", "a100-40gb", (("max_length", 2048),)),
    ("gemma-3-12b", "a100-40gb", (("max_length", 2048),)),
    ("qwen2.5-1.5b", "a40", (("method", "full"), ("optim", "adamw_torch_fused"))),
    ("llama-3.1-8b", "a40", (("method", "lora"),)),
    ("qwen2.5-32b", "a40", ()),
)


def _estimate(setup: TrainingSetup, allocator: str | None = None) -> MemoryBreakdown:
    """Of a run with an allocator; null for the one that the profiles made here are measured with."""
    gpu = gpu_catalog().get(MEASURED_ON)
    return estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(setup.model)),
        gpu=gpu,
        replay=True,
        allocator=allocator or machine_allocator(),
    )


def _capped(setup: TrainingSetup, usable_bytes: int) -> Profile:
    found = _estimate(setup)
    # Context and managed memory: what the process holds beyond what the allocator reserves.
    outside = found.process_bytes - found.reserved_bytes
    return Profile(setup=setup, steps=1, memory_cap_bytes=usable_bytes - outside)


def _longest(setup: TrainingSetup, usable_bytes: int) -> TrainingSetup:
    """The longest length, in steps of 8, whose upper end is within the bytes."""
    low, high = setup.max_length, setup.max_length * MAX_LENGTH_GROWTH
    while high - low > 8:
        middle = (low + high) // 16 * 8
        fits = _estimate(setup.replace(max_length=middle)).process_upper_bytes <= usable_bytes
        low, high = (middle, high) if fits else (low, middle)
    return setup.replace(max_length=low)


def _over(setup: TrainingSetup, usable_bytes: int) -> TrainingSetup:
    """The shortest length, in steps of 1.5%, that is predicted to need OVER times the bytes."""
    while _estimate(setup).process_bytes < OVER * usable_bytes:
        setup = setup.replace(max_length=int(setup.max_length * 1.015) // 8 * 8 + 8)
    return setup


def make(folder: Path) -> None:
    """Write the three files of profiles."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"fits": [], "tight": [], "over": []}
    for model, gpu, knobs in PAIRS:
        plan = make_plan(PlanRequest(model=model, gpu=gpu, knobs=knobs))
        usable = plan.gpu.usable_bytes
        accumulation = min(2, plan.setup.gradient_accumulation_steps)
        chosen = plan.setup.replace(dtype="bfloat16", gradient_accumulation_steps=accumulation)
        if not plan.fits:
            print(f"{model} does not fit on {gpu}")
            continue
        setups = {"fits": chosen, "tight": _longest(chosen, usable), "over": _over(chosen, usable)}
        for kind, setup in setups.items():
            lines[kind].append(profile_line(_capped(setup, usable)))
            print(kind, model, gpu, setup.max_length, setup.per_device_train_batch_size, plan.strategy)
    for kind, found in lines.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")


def judge(path: Path) -> None:
    """Print each capped run's end beside what the model says of it now."""
    wrong = 0
    for record in read_records(path):
        if record.memory_cap_bytes is None:
            continue
        found = _estimate(record.setup, record.allocator)
        usable = record.memory_cap_bytes + found.process_bytes - found.reserved_bytes
        said = "fits" if found.process_upper_bytes <= usable else "over"
        said = said if said == "fits" or found.process_bytes >= OVER * usable else "unsure"
        wrong += (said, record.outcome) in (("fits", "oom"), ("over", "ok"))
        share, setup = found.process_bytes / usable, record.setup
        print(f"{said:6s} {record.outcome:3s} {share:6.3f} of the card  {setup.model} {setup.max_length}")
    print(f"{wrong} contradicted")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "judge"))
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    make(arguments.path) if arguments.what == "make" else judge(arguments.path)


if __name__ == "__main__":
    main()
