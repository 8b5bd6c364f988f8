"""Advice: changes that make a plan fit, or that use what it leaves, each estimated like the plan itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.candidate import Candidate, Evaluator
from planner.cards import fits_on, smallest_gpu_for
from planner.gpu_target import GpuTarget
from planner.longest import longest_length
from planner.methods import with_method
from planner.model_catalog import ModelSummary, list_models, resolve_model
from planner.model_spec import ModelSpec
from planner.plan import Advice, CardAdvice
from planner.policy import DEFAULT_LENGTHS
from planner.request import PlanRequest
from planner.search import search
from planner.training_setup import TrainingSetup

SMALL_RANK = 8
LARGE_RANKS = (64, 32)
MEMORY_SAVING_OPTIMIZERS = ("paged_adamw_8bit", "paged_lion_8bit")
MAX_ADVICE = 6
WORTH_MENTIONING = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """A changed setup, how to ask for it, and what it costs or brings."""

    title: str
    flags: str
    effect: str
    setup: TrainingSetup


def make_it_fit(evaluator: Evaluator, setup: TrainingSetup, target: GpuTarget) -> tuple[Advice, ...]:
    """Changes to a setup that does not fit: those that make it fit first, then by bytes saved."""
    now = evaluator.evaluate(setup).peak_upper_bytes
    found = [_advice(evaluator, change, now) for change in _savings(setup, evaluator.model, target)]
    combined = _all_together(setup, evaluator.model, target)
    useful = [one for one in found if one is not None and one.change_bytes < 0]
    together = None if combined is None else _advice(evaluator, combined, now)
    if together is not None and len(useful) > 1 and not any(one.fits for one in useful):
        useful.append(together)
    # Changes come with the least harm first, and the sort keeps that order among those that fit.
    useful.sort(key=lambda one: (not one.fits, 0 if one.fits else one.change_bytes))
    extra = [_free_memory(now, target, evaluator), _smaller_model(evaluator, setup, now)]
    return (*useful[:MAX_ADVICE], *(one for one in extra if one is not None))


def use_what_is_left(evaluator: Evaluator, setup: TrainingSetup, request: PlanRequest) -> tuple[Advice, ...]:
    """Ways to spend the memory that a fitting plan leaves: rank, length, 16-bit LoRA; each searched anew."""
    now = evaluator.evaluate(setup).peak_upper_bytes
    found = []
    for group in (*_spendings(setup), _longer(evaluator, setup, request)):
        for change in group:
            best = _searched(evaluator, change.setup, setup.effective_batch_size, request)
            if best is None:
                continue
            found.append(
                Advice(
                    title=change.title,
                    flags=change.flags,
                    effect=change.effect,
                    peak_upper_bytes=best.peak_upper_bytes,
                    change_bytes=best.peak_upper_bytes - now,
                    fits=True,
                    tokens_per_second=best.tokens_per_second,
                )
            )
            break
    return tuple(found)


def smallest_card(evaluator: Evaluator, setup: TrainingSetup, lengths: tuple[int, ...]) -> CardAdvice | None:
    """The card with least memory that takes the smallest form of the setup at one of the lengths.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    shortest = setup.replace(max_length=min(lengths))
    about = evaluator.evaluate(shortest).peak_upper_bytes
    gpu = smallest_gpu_for(shortest, evaluator.model, about, above_bytes=evaluator.usable_bytes)
    if gpu is None:
        return None
    longest = next(
        length
        for length in sorted(lengths, reverse=True)
        if fits_on(gpu, setup.replace(max_length=length), evaluator.model)
    )
    return CardAdvice(
        gpu=gpu.id,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=gpu.usable_bytes,
        max_length=longest,
    )


def _advice(evaluator: Evaluator, change: _Change, now: int) -> Advice | None:
    candidate = evaluator.try_evaluate(change.setup)
    if candidate is None:
        return None
    return Advice(
        title=change.title,
        flags=change.flags,
        effect=change.effect,
        peak_upper_bytes=candidate.peak_upper_bytes,
        change_bytes=candidate.peak_upper_bytes - now,
        fits=evaluator.fits(candidate),
        tokens_per_second=candidate.tokens_per_second,
    )


def _savings(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Iterator[_Change]:
    """Single changes that need less memory, the least harmful to the result first."""
    yield from _free_savings(setup, model, target)
    yield from _method_savings(setup)
    shorter = [length for length in DEFAULT_LENGTHS if length < setup.max_length]
    if setup.max_length // 2 >= DEFAULT_LENGTHS[0]:
        shorter.insert(0, setup.max_length // 2)
    for length in shorter:
        yield _Change(
            title=f"length {length:,} instead of {setup.max_length:,}",
            flags=f"--max-length {length}",
            effect="longer examples are cut",
            setup=setup.replace(max_length=length),
        )
    if setup.uses_lora and setup.lora_r > SMALL_RANK:
        yield _Change(
            title=f"rank {SMALL_RANK} instead of {setup.lora_r}",
            flags=f"--lora-r {SMALL_RANK}",
            effect="a smaller adapter learns less",
            setup=setup.replace(lora_r=SMALL_RANK, lora_alpha=None),
        )


def _free_savings(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> Iterator[_Change]:
    """Changes that cost speed at most, not quality."""
    if setup.per_device_train_batch_size > 1:
        yield _smaller_batch(setup)
    if not setup.gradient_checkpointing or setup.checkpointed_layers is not None:
        yield _Change(
            title="checkpoint all layers",
            flags="--gradient-checkpointing",
            effect="layers are computed twice",
            setup=setup.replace(
                gradient_checkpointing=True, checkpointed_layers=None, activation_memory_budget=None
            ),
        )
    if setup.prepare_for_kbit_training:
        yield _Change(
            title="without prepare_for_kbit_training",
            flags="--no-prepare-for-kbit-training",
            effect="TRL does not need it",
            setup=setup.replace(prepare_for_kbit_training=False),
        )
    if setup.attn_implementation == "eager" and model.default_attn_implementation != "eager":
        yield _Change(
            title="sdpa instead of eager attention",
            flags="--attn-implementation sdpa",
            effect="the same result, faster",
            setup=setup.replace(attn_implementation="sdpa"),
        )
    if setup.dtype == "float32":
        yield _Change(
            title=f"{target.spec.dtype} instead of float32",
            flags=f"--dtype {target.spec.dtype}",
            effect="what most people train in",
            setup=setup.replace(dtype=target.spec.dtype),
        )
    if setup.method == "qlora" and not setup.bnb_4bit_use_double_quant:
        yield _Change(
            title="double quantisation",
            flags="--bnb-4bit-use-double-quant",
            effect="no loss known",
            setup=setup.replace(bnb_4bit_use_double_quant=True),
        )
    if setup.optim not in MEMORY_SAVING_OPTIMIZERS:
        yield _Change(
            title=f"paged_adamw_8bit instead of {setup.optim}",
            flags="--optim paged_adamw_8bit",
            effect="8-bit states in pageable memory",
            setup=setup.replace(optim="paged_adamw_8bit"),
        )


def _method_savings(setup: TrainingSetup) -> Iterator[_Change]:
    if setup.use_dora:
        yield _Change(
            title="LoRA instead of DoRA",
            flags="--no-use-dora",
            effect="no magnitude vector",
            setup=setup.replace(use_dora=False),
        )
    if setup.uses_lora and setup.lora_dropout > 0:
        yield _Change(
            title="no LoRA dropout",
            flags="--lora-dropout 0",
            effect="less regularisation",
            setup=setup.replace(lora_dropout=0.0),
        )
    for method, title in (("lora", "16-bit LoRA"), ("qlora", "QLoRA")):
        if method != setup.method and setup.method in ("full", "lora")[: 1 if method == "lora" else 2]:
            yield _Change(
                title=f"{title} instead of {'full fine-tuning' if setup.method == 'full' else '16-bit LoRA'}",
                flags=f"--method {method}",
                effect="trains an adapter" if setup.method == "full" else "the base in 4 bits",
                setup=with_method(setup, method),
            )


def _smaller_batch(setup: TrainingSetup) -> _Change:
    accumulation = setup.gradient_accumulation_steps * setup.per_device_train_batch_size
    return _Change(
        title=f"micro-batch 1, {accumulation} times accumulated",
        flags=f"--per-device-train-batch-size 1 --gradient-accumulation-steps {accumulation}",
        effect="the same effective batch, slower",
        setup=setup.replace(per_device_train_batch_size=1, gradient_accumulation_steps=accumulation),
    )


def _all_together(setup: TrainingSetup, model: ModelSpec, target: GpuTarget) -> _Change | None:
    """Every saving at once, at the shortest default length."""
    flags: list[str] = []
    changed = setup
    for _ in range(16):
        # The last saving of each kind is the strongest; applying it can leave others, until none is left.
        changes = list(_savings(changed, model, target))
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
    return _Change(title="all of these together", flags=" ".join(flags), effect="", setup=changed)


def _free_memory(now: int, target: GpuTarget, evaluator: Evaluator) -> Advice | None:
    if not target.held_bytes:
        return None
    what = "close the other processes on the GPU" if target.index is not None else "detach the display"
    return Advice(
        title=what,
        flags="",
        effect="frees what they hold",
        peak_upper_bytes=now,
        change_bytes=0,
        fits=now <= evaluator.usable_bytes + target.held_bytes,
        tokens_per_second=None,
    )


def _smaller_model(evaluator: Evaluator, setup: TrainingSetup, now: int) -> Advice | None:
    """The largest smaller model of the family that fits with the same setup."""
    for summary in _family(evaluator.model):
        other = Evaluator(resolve_model(summary.id), evaluator.gpu, evaluator.usable_bytes)
        candidate = other.try_evaluate(setup.replace(model=summary.id))
        if candidate is not None and other.fits(candidate):
            return Advice(
                title=f"{summary.id} instead",
                flags=f"--model {summary.id}",
                effect="the largest of its family that fits",
                peak_upper_bytes=candidate.peak_upper_bytes,
                change_bytes=candidate.peak_upper_bytes - now,
                fits=True,
                tokens_per_second=candidate.tokens_per_second,
            )
    return None


def _family(model: ModelSpec) -> list[ModelSummary]:
    """Smaller catalog models of the same name: those of the same generation first, the largest first."""
    name = re.match(r"[a-z]+", model.id)
    generation = model.id.rpartition("-")[0]
    smaller = [
        summary
        for summary in list_models()
        if name is not None
        and summary.id.startswith(name[0])
        and summary.parameter_count < model.parameter_count
    ]
    return sorted(smaller, key=lambda s: (s.id.rpartition("-")[0] != generation, -s.parameter_count))


def _spendings(setup: TrainingSetup) -> Iterator[tuple[_Change, ...]]:
    """Groups of changes that need more memory; of each group the first that fits is wanted."""
    if setup.uses_lora:
        yield tuple(
            _Change(
                title=f"rank {rank}",
                flags=f"--lora-r {rank}",
                effect="a larger adapter",
                setup=setup.replace(lora_r=rank, lora_alpha=None),
            )
            for rank in LARGE_RANKS
            if rank > setup.lora_r
        )
    if setup.method == "qlora":
        yield (
            _Change(
                title="16-bit LoRA",
                flags="--method lora",
                effect="no quantisation of the base",
                setup=with_method(setup, "lora"),
            ),
        )


def _longer(evaluator: Evaluator, setup: TrainingSetup, request: PlanRequest) -> tuple[_Change, ...]:
    """The longest length that fits, when it is worth mentioning."""
    shape: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps * setup.per_device_train_batch_size,
        "gradient_checkpointing": True,
    }
    smallest = setup if any(name in request.fixed for name in shape) else setup.replace(**shape)
    limit = evaluator.model.max_position_embeddings
    length = None
    if limit > setup.max_length:
        length = longest_length(evaluator, smallest, start=setup.max_length, limit=limit)
    if length is None or length < setup.max_length * WORTH_MENTIONING:
        return ()
    return (
        _Change(
            title=f"length {length:,}",
            flags=f"--max-length {length}",
            effect="the longest that fits",
            setup=setup.replace(max_length=length),
        ),
    )


def _searched(
    evaluator: Evaluator, setup: TrainingSetup, effective: int, request: PlanRequest
) -> Candidate | None:
    """The fastest that fits with the changed setup as base."""
    fixed: dict[str, Any] = dict(request.fixed)
    if evaluator.try_evaluate(setup) is None:
        return None
    result = search(setup, evaluator, effective_batch_size=effective, fixed=fixed)
    return None if result.chosen is None else result.chosen.candidate
