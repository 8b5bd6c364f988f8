"""The next setup down: what trains the same as one that ran out of memory, and needs less."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.models.spec import ModelSpec
from planner.search import search
from planner.search.evaluator import Candidate, Evaluator
from planner.search.lean import smallest_that_fits
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup

EXECUTION_KNOBS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpointed_layers",
    "selective_checkpointing",
    "activation_memory_budget",
    "activation_offloading",
    "compile",
)
"""Knobs of how a step is executed, not of what is learned, so long as the effective batch is kept."""
CPU_KEEPS = ("activation_offloading", "compile")
"""Those that a run on the CPU does not have."""
SHARES_LEFT = (0.85, 0.95)
"""Shares of what ran out that the next setup may need, tried in turn: chosen margins. Recorded runs are
within 1.5% of their plan in memory, so what ran out was planned for another card, data or neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDown:
    """A setup that needs less, what it needs (`peak_upper_bytes`), and in words what differs."""

    setup: TrainingSetup
    peak_upper_bytes: int
    changes: str


def step_down(
    setup: TrainingSetup,
    model: ModelSpec,
    gpu: GpuSpec,
    *,
    usable_bytes: int,
    keep: Iterable[str] = (),
) -> StepDown | None:
    """The fastest setup that learns the same and needs at most a share of SHARES_LEFT of what `setup` was to
    need, or of `usable_bytes`, whichever is less; else the leanest that needs less at all; None where there
    is none.

    Method, rank, length, effective batch, optimizer and how examples are batched stay; of EXECUTION_KNOBS
    those in `keep` too. `usable_bytes` is what the card leaves to the run.

    Raises:
        NotModelledError: the setup's memory is not modelled.
        InputError: the setup asks of the model what it does not have.
    """
    padded = not setup.packing and setup.compile == "none"
    needed = Evaluator(model, gpu, usable_bytes, padded=padded).confirm(setup, whole=True).peak_upper_bytes
    kept = frozenset(keep)
    fixed: dict[str, Any] = {
        name: getattr(setup, name) for name in FIELD_NAMES if name not in EXECUTION_KNOBS or name in kept
    }
    for share in SHARES_LEFT:
        evaluator = Evaluator(model, gpu, int(share * min(needed, usable_bytes)), padded=padded)
        found = search(
            setup, evaluator, effective_batch_size=setup.effective_batch_size, fixed=fixed, confirm=True
        )
        if found.chosen is not None:
            return _to(found.chosen.candidate, setup)
    evaluator = Evaluator(model, gpu, min(needed, usable_bytes) - 1, padded=padded)
    leanest = smallest_that_fits(
        setup, evaluator, effective_batch_size=setup.effective_batch_size, fixed=fixed
    )
    return None if leanest is None else _to(leanest, setup)


def _to(candidate: Candidate, before: TrainingSetup) -> StepDown:
    return StepDown(
        setup=candidate.setup,
        peak_upper_bytes=candidate.peak_upper_bytes,
        changes=changes_in_words(before, candidate.setup),
    )


def changes_in_words(before: TrainingSetup, after: TrainingSetup) -> str:
    """The knobs that differ, as `name old -> new`, joined by commas; empty where none does."""
    names = [knob.name for knob in KNOBS if getattr(before, knob.name) != getattr(after, knob.name)]
    return ", ".join(f"{name} {getattr(before, name)} -> {getattr(after, name)}" for name in names)
