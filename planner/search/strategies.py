"""Strategies of execution: how examples become batches, and how layers are run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.base.values import dataclass
from planner.search.batches import Batch, batches, packed_batches
from planner.search.evaluator import Evaluator
from planner.setup.card_limits import FLEX_CAPABILITY
from planner.setup.knobs import BF16
from planner.setup.methods import as_stored, experts_held
from planner.setup.objective import SFT
from planner.setup.parallelism import FSDP
from planner.setup.training_knobs import SLICED
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """The knobs that a strategy sets, and what a person calls it (nothing for the plain one)."""

    name: str
    knobs: tuple[tuple[str, Any], ...]


EAGER = Mode(name="", knobs=())
COMPILED = Mode(name="compiled, ", knobs=(("compile", "regional"),))
EIGHT_BIT = tuple(
    Mode(name=f"compiled, {value} products, ", knobs=(("compile", "regional"), ("base_matmul", value)))
    for value in ("fp8_backward", "fp8")
)

FLEX = Mode(name="flex attention, ", knobs=(("attn_implementation", "flex_attention"),))
SLICED_EXPERTS = "experts in slices, "
AS_GIVEN = Mode(name="", knobs=())
PACKED = Mode(name="packed, ", knobs=(("packing", True),))
# With sdpa a packed row has a mask of its length squared; flex attention has none and skips what is masked.
PACKED_FLEX = Mode(
    name="packed with flex attention, ",
    knobs=(("packing", True), ("attn_implementation", "flex_attention")),
)

PLAIN: dict[str, Any] = {
    "gradient_checkpointing": True,
    "checkpointed_layers": None,
    "selective_checkpointing": False,
    "activation_memory_budget": None,
    "activation_offloading": False,
    "compile": "none",
}
"""What a search starts from, whatever an earlier one had chosen."""
PLAIN_BATCHES: dict[str, Any] = {
    "packing": False,
    "train_sampling_strategy": "random",
    "attn_implementation": None,
}
"""The same where batches are chosen too."""
LAYERS_KEEP = (
    "gradient_checkpointing",
    "checkpointed_layers",
    "selective_checkpointing",
    "activation_memory_budget",
)
"""Knobs that decide what layers keep; where one is fixed, none of them is chosen."""


def chooses_batches(evaluator: Evaluator) -> bool:
    """Whether there is a choice: examples of several lengths, which are known."""
    return evaluator.examples is not None and evaluator.examples.mixed


def start(base: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any]) -> TrainingSetup:
    """The base without what is to be chosen."""
    base = as_stored(base, evaluator.model, fixed)
    plain: dict[str, Any] = {"experts": experts_held(base, evaluator.model)}
    if not layers_decided(fixed):
        plain |= PLAIN
    if base.base_matmul != BF16:
        # Products in 8 bits are those of compiled layers.
        plain["compile"] = "regional"
    if chooses_batches(evaluator):
        plain |= PLAIN_BATCHES
    return base.replace(**{name: value for name, value in plain.items() if name not in fixed})


def sliced(base: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any]) -> TrainingSetup | None:
    """What `start` gave with products that dequantise a few experts at a time; None where nobody may choose
    that, or the model's experts are not multiplied with so.

    For where nothing fits otherwise: no GPU has timed it.
    """
    if base.experts != "4bit" or "experts_matmul" in fixed or base.experts_matmul == SLICED:
        return None
    setup = base.replace(experts_matmul=SLICED)
    if evaluator.run(base).trained.experts_rank or evaluator.try_fitted(setup) is None:
        return None
    return setup


def batchings(base: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any]) -> Iterator[Mode]:
    """Ways to make batches that the fixed knobs leave open. Grouping by length is for a person to ask for: it
    learns long examples more slowly than random batches do (docs/search.md).
    """
    if not chooses_batches(evaluator) or base.objective is not SFT:
        yield AS_GIVEN
        return
    if not base.packing:
        yield AS_GIVEN
    if fixed.get("packing", True) and base.train_sampling_strategy == "random":
        yield PACKED
        default = evaluator.run(base).attention
        capability = evaluator.gpu.compute_capability
        if "attn_implementation" not in fixed and default == "sdpa" and capability >= FLEX_CAPABILITY:
            yield PACKED_FLEX


def ways(
    base: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any]
) -> Iterator[tuple[str, TrainingSetup, bool]]:
    """Every way to batch and to run layers: what a person calls it, the base run so, and whether it is just
    what was asked for.
    """
    for batching in batchings(base, evaluator, fixed):
        batched = base.replace(**dict(batching.knobs))
        asked_for = batching is AS_GIVEN or base.packing
        for mode in modes(batched, evaluator, fixed):
            setup = batched.replace(**dict(mode.knobs))
            yield batching.name + mode.name, setup, asked_for and mode is EAGER


def layers_decided(fixed: Mapping[str, Any]) -> bool:
    """Whether a fixed knob says what layers keep, so that none of those knobs is chosen."""
    return any(name in fixed for name in LAYERS_KEEP)


def choices(
    setup: TrainingSetup, evaluator: Evaluator, effective: int, fixed: Mapping[str, Any]
) -> tuple[Batch, ...]:
    """Micro-batches that give the effective batch of examples, smallest first.

    Raises:
        InputError: the fixed knobs cannot give it.
    """
    if setup.packing and evaluator.examples is not None:
        per_row = evaluator.examples.examples_per_row(setup)
        return packed_batches(effective, per_row, setup.num_processes, fixed)
    return batches(effective, setup.num_processes, fixed)


def modes(base: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any]) -> tuple[Mode, ...]:
    """Ways to execute layers that the fixed knobs leave open and that this card and data allow.

    Compiled layers and flex attention want batches of one shape. Under FSDP2 layers are compiled where that
    is asked for alone: two ranks on CPUs do (tests/stack/test_compiled_shards.py), nobody has timed them on
    GPUs.
    """
    if base.distributed == FSDP or base.base_matmul != BF16 or base.objective is not SFT:
        return (EAGER,)
    found: tuple[Mode, ...] = (EAGER,)
    one_shape = base.packing or not evaluator.padded
    open_attention = "attn_implementation" not in fixed and base.attn_implementation is None
    if open_attention and one_shape and evaluator.flexes_sinks:
        found = (EAGER, FLEX)
    if "compile" not in fixed and one_shape and evaluator.compiles:
        found = (*found, COMPILED)
    compiles = COMPILED in found or base.compile != "none"
    if compiles and "base_matmul" not in fixed and evaluator.multiplies_8bit and takes_8bit(base):
        found = (*found, *EIGHT_BIT)
    return found


def takes_8bit(setup: TrainingSetup) -> bool:
    """Whether the setup's frozen base can be multiplied in 8 bits."""
    return setup.uses_lora and setup.dtype == "bfloat16"
