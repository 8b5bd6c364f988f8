"""What to change, and the automatic choice: searches over setups, made for a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.tui import knobs
from launcher.tui.cards import Card
from launcher.tui.sizing import Sizing, Verdict, on_all_cards, size_up
from launcher.tui.text import gib
from planner.candidate import Evaluator
from planner.errors import InputError
from planner.model_spec import ModelSpec
from planner.search import search
from planner.training_setup import TrainingSetup

_LIMIT = 6
# A change that frees or brings less than this is not worth a line.
_LEAST_SHARE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of the knobs with the answer it leads to. `title` says what changes."""

    title: str
    sizing: Sizing


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The setup that the planner picks, and in a line why."""

    setup: TrainingSetup
    reason: str


def changes(sizing: Sizing, *, cancelled: Callable[[], bool] = lambda: False) -> tuple[Change, ...]:
    """Single changes that help: to make it fit, the most memory freed first; else to use what is left, the fastest first."""
    found: list[Change] = []
    for title, setup in _variants(sizing.setup):
        if cancelled():
            return ()
        try:
            changed = size_up(setup, sizing.model, sizing.card)
        except InputError:
            continue
        found.append(Change(title=title, sizing=changed))
    if sizing.verdict is Verdict.FITS:
        return _faster(sizing, found)
    return _smaller(sizing, found)


def automatic_choice(name: str, model: ModelSpec, card: Card, texts: Mapping[str, str]) -> Choice:
    """The fastest setup that fits, at the knobs' length, method, adapter and effective batch.

    The dtype is what the card computes in.

    Raises:
        InputError: a knob is not valid, or nothing fits.
    """
    base = on_all_cards(knobs.to_setup(name, {**texts, "dtype": card.spec.dtype}, {}), card)
    evaluator = Evaluator(model, card.spec, card.usable_bytes)
    result = search(base, evaluator, effective_batch_size=base.effective_batch_size, fixed={})
    if result.chosen is None:
        needed = result.smallest.candidate.peak_upper_bytes
        raise InputError(
            f"nothing fits at {base.max_length:,} tokens; the smallest setup needs up to {gib(needed)}"
        )
    setup = result.chosen.candidate.setup
    return Choice(
        setup=setup,
        reason=f"{result.chosen.strategy}, micro-batch {setup.per_device_train_batch_size} × "
        f"{setup.gradient_accumulation_steps}; the fastest of {len(result.tried)} tried",
    )


def _smaller(now: Sizing, found: list[Change]) -> tuple[Change, ...]:
    least = now.memory.peak_bytes * (1 - _LEAST_SHARE)
    helping = [change for change in found if change.sizing.memory.peak_bytes < least]
    # What makes it fit comes first, and of those what gives up least; then what frees most.
    helping.sort(
        key=lambda change: (
            change.sizing.verdict is not Verdict.FITS,
            -change.sizing.memory.peak_bytes
            if change.sizing.verdict is Verdict.FITS
            else change.sizing.memory.peak_bytes,
        )
    )
    return tuple(helping[:_LIMIT])


def _faster(now: Sizing, found: list[Change]) -> tuple[Change, ...]:
    fitting = [change for change in found if change.sizing.verdict is Verdict.FITS]
    more = [change for change in fitting if _gain(now, change) > _LEAST_SHARE or _longer(now, change)]
    more.sort(key=lambda change: -_gain(now, change))
    return tuple(more[:_LIMIT])


def _gain(now: Sizing, change: Change) -> float:
    if now.step is None or change.sizing.step is None:
        return 0.0
    return change.sizing.step.tokens_per_second / now.step.tokens_per_second - 1


def _longer(now: Sizing, change: Change) -> bool:
    return change.sizing.setup.max_length > now.setup.max_length


def _variants(setup: TrainingSetup) -> Iterator[tuple[str, TrainingSetup]]:
    if setup.method != "qlora":
        yield "qlora in place of " + setup.method, setup.replace(method="qlora")
    if setup.gradient_checkpointing:
        off = {"gradient_checkpointing": False, "checkpointed_layers": None, "selective_checkpointing": False}
        yield "no checkpointing", setup.replace(**off)
    else:
        yield "checkpointing", setup.replace(gradient_checkpointing=True, activation_memory_budget=None)
    yield from _batches(setup)
    if setup.optim != "paged_adamw_8bit":
        yield "paged 8-bit AdamW", setup.replace(optim="paged_adamw_8bit")
    if setup.uses_lora and setup.lora_dropout:
        yield "no dropout", setup.replace(lora_dropout=0.0)
    if setup.uses_lora and setup.lora_r > 8:
        yield f"rank {setup.lora_r // 2}", setup.replace(lora_r=setup.lora_r // 2)
    for length in (setup.max_length // 4, setup.max_length // 2, setup.max_length * 2):
        if length >= 128:
            yield f"{length:,} tokens", setup.replace(max_length=length)


def _batches(setup: TrainingSetup) -> Iterator[tuple[str, TrainingSetup]]:
    """Micro-batches that leave the effective batch as it is."""
    share = setup.per_device_train_batch_size * setup.gradient_accumulation_steps
    for micro in (setup.per_device_train_batch_size // 2, setup.per_device_train_batch_size * 2, 1):
        if micro >= 1 and micro != setup.per_device_train_batch_size and share % micro == 0:
            changed = setup.replace(
                per_device_train_batch_size=micro, gradient_accumulation_steps=share // micro
            )
            yield f"micro-batch {micro} × {share // micro}", changed
