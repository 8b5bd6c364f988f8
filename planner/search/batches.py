"""Micro-batches and accumulations that give an effective batch, in examples or in packed rows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.setup.training_setup import TrainingSetup

MOST_OFF = 0.25
"""Share of the wished examples a step by which packed rows, which hold several each, may miss them."""
_MICRO, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch and how often it is accumulated."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    def of(self, setup: TrainingSetup) -> TrainingSetup:
        """The setup with this batch."""
        return setup.replace(
            per_device_train_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )


def batches(effective: int, num_processes: int, fixed: Mapping[str, Any]) -> tuple[Batch, ...]:
    """Micro-batches that give the effective batch, smallest first.

    All divisors of a GPU's share are taken, powers of two among them.

    Raises:
        InputError: the fixed micro-batch, accumulation or number of GPUs cannot give that effective batch.
    """
    if effective % num_processes:
        raise InputError(f"an effective batch of {effective} cannot be shared by {num_processes} GPUs evenly")
    found = _divided(effective // num_processes, fixed)
    if not found:
        asked = " and ".join(f"{name} {fixed[name]}" for name in (_MICRO, _ACCUMULATION) if name in fixed)
        gpus = f" on {num_processes} GPUs" if num_processes > 1 else ""
        raise InputError(f"{asked} cannot give an effective batch of {effective}{gpus}")
    return found


def packed_batches(
    effective: int, examples_per_row: float, num_processes: int, fixed: Mapping[str, Any]
) -> tuple[Batch, ...]:
    """Micro-batches of packed rows, smallest first; none where no number of rows is near enough.

    A step has the number of rows that holds about the effective batch of examples. Where packing was asked
    for, the nearest number is taken, however far that is.
    """
    unit = num_processes * fixed.get(_MICRO, 1) * fixed.get(_ACCUMULATION, 1)
    rows: int = unit
    if _MICRO not in fixed or _ACCUMULATION not in fixed:
        rows *= max(1, round(effective / (examples_per_row * unit)))
    if not fixed.get("packing") and abs(rows * examples_per_row - effective) > MOST_OFF * effective:
        return ()
    return _divided(rows // num_processes, fixed)


def _divided(share: int, fixed: Mapping[str, Any]) -> tuple[Batch, ...]:
    micro, accumulation = fixed.get(_MICRO), fixed.get(_ACCUMULATION)
    return tuple(
        Batch(per_device_train_batch_size=size, gradient_accumulation_steps=share // size)
        for size in range(1, share + 1)
        if share % size == 0 and micro in (None, size) and accumulation in (None, share // size)
    )
