"""Savings: changes to a setup that need less memory, each with the options that ask for it and its price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.gpus.target import GpuTarget
from planner.models.spec import ModelSpec
from planner.setup.defaults import DEFAULT_LENGTHS, OPTIM
from planner.setup.methods import with_method
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


def savings(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Iterator[Change]:
    """Single changes that need less memory, the least harmful to the result first."""
    yield from _free_savings(setup, model, target)
    yield from _method_savings(setup)
    shorter = [length for length in DEFAULT_LENGTHS if length < setup.max_length]
    if setup.max_length // 2 >= DEFAULT_LENGTHS[0]:
        shorter.insert(0, setup.max_length // 2)
    for length in shorter:
        yield Change(
            title=f"length {length:,} instead of {setup.max_length:,}",
            flags=f"--max-length {length}",
            effect="longer examples are cut",
            setup=setup.replace(max_length=length),
        )
    if setup.uses_lora and setup.lora_r > SMALL_RANK:
        yield Change(
            title=f"rank {SMALL_RANK} instead of {setup.lora_r}",
            flags=f"--lora-r {SMALL_RANK}",
            effect="a smaller adapter learns less",
            setup=setup.replace(lora_r=SMALL_RANK, lora_alpha=None),
        )


def all_together(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Change | None:
    """Every saving at once, at the shortest default length."""
    flags: list[str] = []
    changed = setup
    for _ in range(16):
        # The last saving of each kind is the strongest; applying it can leave others, until none is left.
        changes = list(savings(changed, model, target))
        if not changes:
            break
        strongest = changes[0]
        for change in changes:
            if change.flags.split()[0] == strongest.flags.split()[0]:
                strongest = change
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
        yield Change(
            title="checkpoint all layers",
            flags="--gradient-checkpointing",
            effect="layers are computed twice",
            setup=setup.replace(
                gradient_checkpointing=True, checkpointed_layers=None, activation_memory_budget=None
            ),
        )
    if setup.prepare_for_kbit_training:
        yield Change(
            title="without prepare_for_kbit_training",
            flags="--no-prepare-for-kbit-training",
            effect="TRL does not need it",
            setup=setup.replace(prepare_for_kbit_training=False),
        )
    if setup.attn_implementation == "eager" and model.default_attn_implementation != "eager":
        yield Change(
            title="sdpa instead of eager attention",
            flags="--attn-implementation sdpa",
            effect="the same result, faster",
            setup=setup.replace(attn_implementation="sdpa"),
        )
    if setup.dtype == "float32":
        yield Change(
            title=f"{target.spec.dtype} instead of float32",
            flags=f"--dtype {target.spec.dtype}",
            effect="what most people train in",
            setup=setup.replace(dtype=target.spec.dtype),
        )
    if setup.method == "qlora" and not setup.bnb_4bit_use_double_quant:
        yield Change(
            title="double quantisation",
            flags="--bnb-4bit-use-double-quant",
            effect="no loss known",
            setup=setup.replace(bnb_4bit_use_double_quant=True),
        )
    if setup.optim not in MEMORY_SAVING_OPTIMIZERS:
        yield Change(
            title=f"{OPTIM} instead of {setup.optim}",
            flags=f"--optim {OPTIM}",
            effect="states of 8 bits",
            setup=setup.replace(optim=OPTIM),
        )


def _method_savings(setup: TrainingSetup) -> Iterator[Change]:
    if setup.use_dora:
        yield Change(
            title="LoRA instead of DoRA",
            flags="--no-use-dora",
            effect="no magnitude vector",
            setup=setup.replace(use_dora=False),
        )
    if setup.uses_lora and setup.lora_dropout > 0:
        yield Change(
            title="no LoRA dropout",
            flags="--lora-dropout 0",
            effect="less regularisation",
            setup=setup.replace(lora_dropout=0.0),
        )
    for method, title in (("lora", "16-bit LoRA"), ("qlora", "QLoRA")):
        if method != setup.method and setup.method in ("full", "lora")[: 1 if method == "lora" else 2]:
            yield Change(
                title=f"{title} instead of {'full fine-tuning' if setup.method == 'full' else '16-bit LoRA'}",
                flags=f"--method {method}",
                effect="trains an adapter" if setup.method == "full" else "the base in 4 bits",
                setup=with_method(setup, method),
            )


def _smaller_batch(setup: TrainingSetup) -> Change:
    accumulation = setup.gradient_accumulation_steps * setup.per_device_train_batch_size
    return Change(
        title=f"micro-batch 1, {accumulation} times accumulated",
        flags=f"--per-device-train-batch-size 1 --gradient-accumulation-steps {accumulation}",
        effect="the same effective batch, slower",
        setup=setup.replace(per_device_train_batch_size=1, gradient_accumulation_steps=accumulation),
    )
