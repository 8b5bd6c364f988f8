"""What another card would bring: the next one that runs faster or longer, and one that people rent.

A few setups are estimated on each card, none replayed: those of the plan's own search that the card holds,
with larger micro-batches and as many layers without checkpointing as fit. A plan made for that card may find
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from planner.answers.plan import CardAdvice, Duration, OtherCard
from planner.base.errors import NotModelledError
from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog
from planner.gpus.price import run_cost
from planner.gpus.spec import GpuSpec
from planner.search import Tried, fastest, fewest_layers, finish_seconds
from planner.search.cards import native
from planner.search.evaluator import Candidate, Evaluator
from planner.setup.training_setup import TrainingSetup

LADDER = (
    "rtx-3060-12gb",
    "rtx-4080-super",
    "rtx-4090",
    "rtx-5090",
    "l40s",
    "a100-80gb",
    "h100-80gb",
    "h200",
    "b200",
)
"""One card for each size that people buy or rent, by rising memory."""
RENTED = ("h100-80gb", "h200", "b200")
"""What clouds rent for training; the first that is more than the card asked for is named."""
MORE_MEMORY = 1.1
WORTH_NAMING = 1.15
"""A card that is less than this much faster, and takes nothing longer, is not named."""
MAX_TRIED = 6
CHECKPOINTING = frozenset({"gradient_checkpointing", "checkpointed_layers", "selective_checkpointing"})
BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the plan was made for, and what it came to.

    `tried` is all of the search on its card, `fits` whether the chosen one does; `lengths` are those that the
    person would like, the best first, `open_ended` that longer ones may be better still. `fixed` are the
    knobs that were asked for. `tokens` are those that the search took the run to have. `smallest` is the
    smallest card where nothing fits.
    """

    tried: Sequence[Tried]
    chosen: Candidate
    fits: bool
    lengths: Sequence[int]
    open_ended: bool
    fixed: frozenset[str]
    tokens: int
    duration: Duration | None
    smallest: CardAdvice | None


def other_cards(question: Question, evaluator: Evaluator) -> tuple[OtherCard, ...]:
    """At most two cards with more memory than the plan's, the smaller one first."""
    if question.duration is None or question.chosen.setup.num_processes > 1:
        return ()
    found: list[OtherCard] = []
    for cards in (_larger(question, evaluator), _rented(evaluator)):
        for gpu in cards:
            if found and gpu.usable_bytes <= found[0].usable_bytes:
                break
            one = _on(gpu, question, evaluator, question.duration)
            if one is not None and _worth_naming(one, question):
                found.append(one)
                break
    return tuple(found)


def _larger(question: Question, evaluator: Evaluator) -> Iterator[GpuSpec]:
    """Cards with more memory; where nothing fits, the smallest that takes the model comes first."""
    least = evaluator.usable_bytes * MORE_MEMORY
    if not question.fits:
        if question.smallest is None:
            return
        yield gpu_catalog().get(question.smallest.gpu)
        least = question.smallest.usable_bytes
    for gpu in map(gpu_catalog().get, LADDER):
        if gpu.usable_bytes >= least:
            yield gpu


def _rented(evaluator: Evaluator) -> Iterator[GpuSpec]:
    for gpu in map(gpu_catalog().get, RENTED):
        if gpu.usable_bytes >= evaluator.usable_bytes * MORE_MEMORY:
            yield gpu


def _worth_naming(one: OtherCard, question: Question) -> bool:
    if not question.fits or one.longer_length is not None:
        return True
    return one.speedup is not None and one.speedup >= WORTH_NAMING


def _on(gpu: GpuSpec, question: Question, evaluator: Evaluator, duration: Duration) -> OtherCard | None:
    there, now, smallest = evaluator.on(gpu), question.chosen, question.smallest
    lengths = (now.setup.max_length,) if question.fits else question.lengths
    if smallest is not None and smallest.gpu == gpu.id:
        lengths = (smallest.max_length,)
    best = next((one for length in lengths if (one := _fastest(question, there, length))), None)
    if best is None and smallest is not None and smallest.gpu == gpu.id:
        # That it fits has been shown by replay, with less to spare than the estimate allows for.
        best = there.try_evaluate(native(now.setup.replace(max_length=smallest.max_length), gpu))
    if best is None or best.tokens_per_second is None:
        return None
    hours = (finish_seconds(best, duration.tokens) or 0.0) / 3600
    cost = run_cost(hours, gpu)
    return OtherCard(
        gpu=gpu.id,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=gpu.usable_bytes,
        setup=best.setup,
        peak_upper_bytes=best.peak_upper_bytes,
        tokens_per_second=best.tokens_per_second,
        speedup=duration.hours / hours if question.fits and hours else None,
        longer_length=_longer(question, evaluator, there),
        hours=hours,
        usd_per_gpu_hour=None if cost is None else cost.usd_per_gpu_hour,
        usd=None if cost is None else cost.usd,
    )


def _longer(question: Question, evaluator: Evaluator, there: Evaluator) -> int | None:
    """The best length beyond the plan's that fits there and not here, by the smallest of what was tried, and
    here by what a plan for that length would try beside it.
    """
    if not question.fits:
        return None
    smallest = min(question.tried, key=lambda one: one.candidate.peak_upper_bytes).candidate.setup
    now = question.chosen.setup.max_length
    wished = [length for length in question.lengths if length > now]
    if not wished and question.open_ended and 2 * now <= evaluator.model.max_position_embeddings:
        wished = [2 * now]
    for length in wished:
        setup = smallest.replace(max_length=length)
        here = any(_fitting(evaluator, one) for one in (setup, _leanest(setup, question.fixed)))
        if not here and _fitting(there, setup) is not None:
            return length
    return None


def _leanest(setup: TrainingSetup, fixed: frozenset[str]) -> TrainingSetup:
    """The same with one sequence at a time, and what its checkpoints keep on the host."""
    if not fixed & BATCH:
        total = setup.per_device_train_batch_size * setup.gradient_accumulation_steps
        setup = setup.replace(per_device_train_batch_size=1, gradient_accumulation_steps=total)
    return setup if "activation_offloading" in fixed else setup.replace(activation_offloading=True)


def _fastest(question: Question, there: Evaluator, length: int) -> Candidate | None:
    """The first to be done of what was tried that fits there, with what that leaves spent on speed.

    Eager and compiled layers are looked at apart: compilation weighs more where steps are faster.
    """
    found = []
    for kind in {one.candidate.setup.compile for one in question.tried}:
        best = None if kind != "none" and not there.compiles else _first(question, there, length, kind)
        if best is not None:
            found += [best, *_spent(best, question.fixed, there)]
    tried = [Tried(strategy=one.setup.compile, candidate=one, fits=True) for one in found]
    winner = fastest(tried, question.tokens)
    return None if winner is None else winner.candidate


def _first(question: Question, there: Evaluator, length: int, kind: str) -> Candidate | None:
    """The fastest setup of a kind, by the card asked for, that fits there."""
    own = (one.candidate for one in question.tried if one.candidate.setup.compile == kind)
    budget = MAX_TRIED
    for one in sorted(own, key=lambda one: -(one.tokens_per_second or 0.0)):
        if one.setup.max_length <= length and one.memory.peak_lower_bytes > there.usable_bytes:
            continue
        best = _fitting(there, one.setup.replace(max_length=length))
        budget -= 1
        if best is not None or budget == 0:
            return best
    return None


def _spent(best: Candidate, fixed: frozenset[str], there: Evaluator) -> Iterator[Candidate]:
    """The same with fewer layers checkpointed, at its micro-batch and at one, and with larger ones."""
    setup = best.setup
    total = setup.per_device_train_batch_size * setup.gradient_accumulation_steps
    sizes = {setup.per_device_train_batch_size, *(() if fixed & BATCH else (1,))}
    for size in sizes if setup.gradient_checkpointing and not fixed & CHECKPOINTING else ():
        batch = setup.replace(per_device_train_batch_size=size, gradient_accumulation_steps=total // size)
        partly = _partly(batch, there)
        if partly is not None:
            yield partly
    while setup.gradient_accumulation_steps % 2 == 0 and not fixed & BATCH:
        setup = setup.replace(
            per_device_train_batch_size=2 * setup.per_device_train_batch_size,
            gradient_accumulation_steps=setup.gradient_accumulation_steps // 2,
        )
        larger = _fitting(there, setup)
        if larger is None:
            return
        yield larger


def _partly(setup: TrainingSetup, there: Evaluator) -> Candidate | None:
    """The same with as few layers checkpointed as fit; None where all have to be."""
    layers = there.model.num_hidden_layers

    def with_layers(some: int) -> Candidate | None:
        return _fitting(there, setup.replace(checkpointed_layers=some))

    fewest = fewest_layers(layers, lambda some: with_layers(some) is not None)
    return with_layers(fewest) if fewest < layers else None


def _fitting(evaluator: Evaluator, setup: TrainingSetup) -> Candidate | None:
    own = native(setup, evaluator.gpu)
    try:
        return evaluator.evaluate(own) if evaluator.setup_fits(own) else None
    except NotModelledError:
        return None
