"""Savings: changes to a setup that need less memory, each with the options that ask for it and its price."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.base.values import dataclass
from planner.gpus.target import GpuTarget
from planner.models.spec import ModelSpec
from planner.setup.defaults import DEFAULT_LENGTHS, OPTIM
from planner.setup.methods import with_method
from planner.setup.options import options_between
from planner.setup.training_setup import TrainingSetup

SMALL_RANK = 8
MEMORY_SAVING_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A changed setup, how to ask for it, and what it costs or brings."""

    title: str
    flags: str
    effect: str
    setup: TrainingSetup


def change(setup: TrainingSetup, title: str, effect: str, **knobs: Any) -> Change:
    """The setup with other knobs, and what to type for them."""
    return change_to(setup, title, effect, setup.replace(**knobs))


def change_to(setup: TrainingSetup, title: str, effect: str, changed: TrainingSetup) -> Change:
    """Another setup in place of this one, and what to type for it."""
    return Change(title=title, flags=options_between(setup, changed), effect=effect, setup=changed)


def savings(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Iterator[tuple[Change, ...]]:
    """Single changes that need less memory, the least harmful to the result first: of each kind the weakest
    first.
    """
    for one in _free_savings(setup, model, target):
        yield (one,)
    yield from _method_savings(setup)
    yield tuple(_shorter(setup))
    if setup.uses_lora and setup.lora_r > SMALL_RANK:
        title, effect = f"rank {SMALL_RANK} instead of {setup.lora_r}", "a smaller adapter learns less"
        yield (change(setup, title, effect, lora_r=SMALL_RANK, lora_alpha=None),)


def all_together(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Change | None:
    """Every saving at once, at the shortest default length."""
    flags: list[str] = []
    changed = setup
    for _ in range(16):
        # The strongest saving of the first kind that is left; applying it can leave others, until none is.
        strongest = next((kind[-1] for kind in savings(changed, model, target) if kind), None)
        if strongest is None:
            break
        flags.append(strongest.flags)
        changed = strongest.setup
    if changed == setup:
        return None
    return Change(title="all of these together", flags=" ".join(flags), effect="", setup=changed)


def _free_savings(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Iterator[Change]:
    """Changes that cost speed at most, not quality."""
    if setup.per_device_train_batch_size > 1:
        yield _smaller_batch(setup)
    if not setup.gradient_checkpointing or setup.checkpointed_layers is not None:
        yield change(
            setup,
            "checkpoint all layers",
            "layers are computed twice",
            gradient_checkpointing=True,
            checkpointed_layers=None,
            activation_memory_budget=None,
        )
    if setup.prepare_for_kbit_training:
        title = "without prepare_for_kbit_training"
        yield change(setup, title, "TRL does not need it", prepare_for_kbit_training=False)
    if setup.attn_implementation == "eager" and model.default_attn_implementation != "eager":
        title = "sdpa instead of eager attention"
        yield change(setup, title, "the same result, faster", attn_implementation="sdpa")
    dtype = target.spec.dtype
    if setup.dtype == "float32":
        yield change(setup, f"{dtype} instead of float32", "what most people train in", dtype=dtype)
    if setup.method == "qlora" and not setup.bnb_4bit_use_double_quant:
        yield change(setup, "double quantisation", "no loss known", bnb_4bit_use_double_quant=True)
    if setup.optim not in MEMORY_SAVING_OPTIMIZERS:
        yield change(setup, f"{OPTIM} instead of {setup.optim}", "states of 8 bits", optim=OPTIM)


def _method_savings(setup: TrainingSetup) -> Iterator[tuple[Change, ...]]:
    if setup.use_dora:
        yield (change(setup, "LoRA instead of DoRA", "no magnitude vector", use_dora=False),)
    if setup.uses_lora and setup.lora_dropout > 0:
        yield (change(setup, "no LoRA dropout", "less regularisation", lora_dropout=0.0),)
    if setup.method == "full":
        yield tuple(
            change_to(
                setup, f"{title} instead of full fine-tuning", "trains an adapter", with_method(setup, method)
            )
            for method, title in (("lora", "16-bit LoRA"), ("qlora", "QLoRA"))
        )
    if setup.method == "lora":
        title = "QLoRA instead of 16-bit LoRA"
        yield (change_to(setup, title, "the base in 4 bits", with_method(setup, "qlora")),)


def _shorter(setup: TrainingSetup) -> Iterator[Change]:
    shorter = [length for length in DEFAULT_LENGTHS if length < setup.max_length]
    if setup.max_length // 2 >= DEFAULT_LENGTHS[0]:
        shorter.insert(0, setup.max_length // 2)
    for length in shorter:
        title = f"length {length:,} instead of {setup.max_length:,}"
        yield change(setup, title, "longer examples are cut", max_length=length)


def _smaller_batch(setup: TrainingSetup) -> Change:
    accumulation = setup.gradient_accumulation_steps * setup.per_device_train_batch_size
    return change(
        setup,
        f"micro-batch 1, {accumulation} times accumulated",
        "the same effective batch, slower",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )
