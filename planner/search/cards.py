"""Cards by the memory they leave, and the smallest that take a setup: one for a desktop, one to rent."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.memory.refusals import unsharded_knob
from planner.search.evaluator import Evaluator
from planner.search.lean import leanest, smallest_that_fits
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, refuse_on_card
from planner.setup.parallelism import FSDP
from planner.setup.training_setup import TrainingSetup

DESKTOP, RENTED = "desktop", "rented"
CARDS = {
    DESKTOP: (
        *("rtx-2060-6gb", "rtx-4060", "rtx-3080-10gb", "rtx-2080-ti", "rtx-3060-12gb"),
        *("rtx-5060-ti-16gb", "rtx-3090", "rtx-5090", "rtx-a6000", "rtx-pro-6000"),
    ),
    RENTED: ("t4", "l4", "v100-32gb", "a100-40gb", "a40", "a100-80gb", "h100-nvl-94gb", "h200", "b200"),
}
"""One card for each size, smallest first, that people have in a desktop (above GeForce's sizes, of those for
workstations) and that clouds have. Of a size: the one that most have, as planner/gpus/parse.py takes it for
the plain size where that is of the kind."""
# Cards differ in what the driver and cuBLAS take by far less than the rest; smaller cards are not tried.
CLEARLY_TOO_SMALL = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFit:
    """A card that takes a setup in some form, its kind, and the bytes that the leanest form needs there."""

    kind: str
    gpu: GpuSpec
    peak_upper_bytes: int


@functools.cache
def cards_by_memory() -> tuple[GpuSpec, ...]:
    """The catalog's cards, by rising usable memory; of equal ones the faster first."""
    return tuple(
        sorted(gpu_catalog(), key=lambda gpu: (gpu.usable_bytes, -(gpu.matrix_flops_per_second or 0.0)))
    )


def smallest_gpus(
    setup: TrainingSetup,
    evaluator: Evaluator,
    fixed: Mapping[str, Any],
    effective_batch_size: int,
    *,
    above_bytes: int = 0,
    held_bytes: int = 0,
) -> tuple[CardFit, ...]:
    """Of each kind the first card on which anything fits that a plan for such a setup tries, in the 16-bit
    type that the card computes in unless one is fixed; none of a kind of which none takes it.

    The model and the data are the evaluator's. Each card has `held_bytes` less than it leaves; those that
    leave no more than `above_bytes`, and those that cannot run a fixed knob, are passed over.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
        InputError: the fixed knobs cannot give the effective batch.
    """
    least = needed_at_least(setup, evaluator, fixed, effective_batch_size)
    least = max(above_bytes, int(CLEARLY_TOO_SMALL * least))
    found = []
    for kind in (DESKTOP, RENTED):
        cards = [gpu for gpu in map(gpu_catalog().get, CARDS[kind]) if gpu.usable_bytes - held_bytes > least]
        fit = _first(cards, kind, setup, evaluator, fixed, effective_batch_size, held_bytes)
        if fit is not None:
            found.append(fit)
    return tuple(found)


def needed_at_least(
    setup: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any], effective_batch_size: int
) -> int:
    """Bytes that the leanest of what a plan tries needs by the fitted estimate, on the largest card.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
        InputError: the fixed knobs cannot give the effective batch.
    """
    largest = evaluator.on(cards_by_memory()[-1])
    found = leanest(setup, largest, effective_batch_size=effective_batch_size, fixed=fixed)
    return min(
        (largest.fitted(one).peak_upper_bytes for one in found),
        default=largest.fitted(setup).peak_upper_bytes,
    )


def smallest_first(found: Sequence[CardFit]) -> CardFit | None:
    """The card of several that leaves least."""
    return min(found, key=lambda one: one.gpu.usable_bytes, default=None)


def _first(
    cards: Sequence[GpuSpec],
    kind: str,
    setup: TrainingSetup,
    evaluator: Evaluator,
    fixed: Mapping[str, Any],
    effective_batch_size: int,
    held_bytes: int,
) -> CardFit | None:
    for gpu in cards:
        own = native(setup, gpu, fixed)
        if own is None:
            continue
        found = smallest_that_fits(
            own,
            evaluator.on(gpu, held_bytes=held_bytes),
            effective_batch_size=effective_batch_size,
            fixed=fixed,
        )
        if found is not None:
            return CardFit(kind=kind, gpu=gpu, peak_upper_bytes=found.peak_upper_bytes)
    return None


def native(setup: TrainingSetup, gpu: GpuSpec, fixed: Mapping[str, Any]) -> TrainingSetup | None:
    """The setup as a plan for the card starts from it, in the card's own 16-bit type unless one is fixed;
    None where the card cannot run a fixed knob, or its type cannot be sharded as was fixed.
    """
    try:
        refuse_on_card(fixed, gpu, (*CARD_LIMITS, BFLOAT16))
    except InputError:
        return None
    own = setup if "dtype" in fixed else setup.replace(dtype=gpu.dtype)
    return None if own.distributed == FSDP and unsharded_knob(own) == "dtype" else own
