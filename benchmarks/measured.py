"""What the benchmarks share: cards that a large GPU stands in for, and rates of measured records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from launcher.measuring.measured_run import WARM_UP_STEPS
from launcher.measuring.profile import Profile
from planner.calibration.records import RunRecord
from planner.gpus.catalog import gpu_catalog
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.memory import estimate_memory
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import machine_allocator
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

MEASURED_ON = "h100-80gb"


def capped_target(card: str) -> GpuTarget:
    """The measured GPU with no more memory than `card` leaves a process."""
    usable = resolve_gpu(card).usable_bytes
    return GpuTarget(
        text=f"{MEASURED_ON} with the memory of {card}",
        spec=gpu_catalog().get(MEASURED_ON),
        count=1,
        usable_bytes=usable,
    )


def memory_cap_bytes(setup: TrainingSetup, usable_bytes: int) -> int:
    """The allocator's cap that leaves a process so much: context and managed memory lie outside it."""
    found = estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(setup.model)), gpu=gpu_catalog().get(MEASURED_ON)
    )
    return usable_bytes - (found.process_bytes - found.reserved_bytes)


def tokens_per_second(record: RunRecord, gradient_accumulation_steps: int) -> float | None:
    """Rate at another accumulation than was measured: passes scale with it, the update comes once a step.

    Medians over the steps after warm-up; None where none was measured.
    """
    steps, updates = record.step_seconds[WARM_UP_STEPS:], record.update_seconds[WARM_UP_STEPS:]
    if not steps:
        return None
    passes = statistics.median(step - update for step, update in zip(steps, updates, strict=True))
    update = statistics.median(updates)
    passes *= gradient_accumulation_steps / record.setup.gradient_accumulation_steps
    tokens = record.setup.tokens_per_micro_step * gradient_accumulation_steps
    return tokens / (passes + update)


def same_run(profile: Profile, record: RunRecord) -> bool:
    """Whether a record is of this profile."""
    return (
        profile.setup == record.setup
        and profile.memory_cap_bytes == record.memory_cap_bytes
        and (profile.allocator or machine_allocator()) == record.allocator
    )


def environment(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The GPU and the stack that records were measured with.

    Raises:
        ValueError: they are of several.
    """
    found = {record.environment for record in records}
    if len(found) != 1:
        raise ValueError(f"records of {len(found)} environments cannot be compared")
    one = found.pop()
    return {
        "gpu": one.gpu_name,
        "driver": one.driver,
        "python": one.python,
        "versions": dict(one.versions),
    }
