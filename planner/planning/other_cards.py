"""Other cards: the smallest that take what does not fit, and what one with more memory would bring.

Of several, one is for a desktop and one is rented. What is said of a card is what a plan for it answers.
"""

from __future__ import annotations

from planner.answers.plan import CardAdvice, Duration, OtherCard
from planner.base.errors import InputError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import DISPLAY_BYTES
from planner.planning.advice import other_knobs
from planner.planning.asked import Asked
from planner.planning.schedule import make_duration, make_schedule
from planner.search.cards import CardFit, smallest_gpus
from planner.search.lean import smallest_that_fits

LADDERS = (
    ("rtx-3060-12gb", "rtx-5060-ti-16gb", "rtx-4090", "rtx-5090", "rtx-pro-6000"),
    ("h100-80gb", "h200", "b200"),
)
"""For a desktop, one card for each size that people buy; to rent, what clouds have for training."""
MORE_MEMORY = 1.1
WORTH_NAMING = 1.15
"""A card that is less than this much faster, and takes nothing longer, is not named."""


def smallest_cards(asked: Asked) -> tuple[CardAdvice, ...]:
    """The card with least memory of each kind, beyond the request's own, for which a plan fits.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    fits = fitting_cards(asked, min(asked.lengths), above_bytes=asked.target.usable_bytes)
    return tuple(one for fit in fits if (one := _advice(asked, fit)) is not None)


def fitting_cards(asked: Asked, length: int, *, above_bytes: int = 0) -> tuple[CardFit, ...]:
    """The card with least memory of each kind for which a plan at a length fits.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    return smallest_gpus(
        asked.base.replace(max_length=length),
        asked.evaluator,
        asked.request.fixed,
        asked.effective_batch_size,
        above_bytes=above_bytes,
        held_bytes=DISPLAY_BYTES if asked.request.display else 0,
    )


def _advice(asked: Asked, fit: CardFit) -> CardAdvice | None:
    there = asked.on_card(fit.gpu.id)
    length = _longest(there)
    if length is None:
        return None
    return CardAdvice(
        gpu=fit.gpu.id,
        name=fit.gpu.name,
        memory_bytes=fit.gpu.memory_bytes,
        usable_bytes=there.target.usable_bytes,
        max_length=length,
        kind=fit.kind,
    )


def _longest(there: Asked) -> int | None:
    """The length that a plan chooses: with data any may be, else the first of few at which something fits."""
    if there.stats is not None:
        found = there.answer
        return None if found is None or not found.fits else found.tried.candidate.setup.max_length
    return next((length for length in there.lengths if fits_at(there, length)), None)


def fits_at(asked: Asked, length: int) -> bool:
    """Whether anything that a plan tries fits at a length.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    found = smallest_that_fits(
        asked.base.replace(max_length=length),
        asked.evaluator,
        effective_batch_size=asked.effective_batch_size,
        fixed=asked.request.fixed,
    )
    return found is not None


def other_cards(
    asked: Asked, duration: Duration | None, smallest: tuple[CardAdvice, ...]
) -> tuple[OtherCard, ...]:
    """Cards with more memory than the plan's, at most one for a desktop and one to rent, the smaller first:
    where nothing fits the `smallest`, else the first of each kind that runs much faster or longer.
    """
    if duration is None or asked.chosen.tried.candidate.setup.num_processes > 1:
        return ()
    if asked.chosen.fits:
        least = asked.target.usable_bytes * MORE_MEMORY
        kinds = [[card for card in ladder if _usable(card) >= least] for ladder in LADDERS]
    else:
        kinds = [[card.gpu] for card in smallest]
    rows = [(row for card in cards if (row := _on(asked, card, duration)) is not None) for cards in kinds]
    found = [next((row for row in kind if _worth_naming(row)), None) for kind in rows]
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.usable_bytes))


def _usable(card: str) -> int:
    return gpu_catalog().get(card).usable_bytes


def _worth_naming(one: OtherCard) -> bool:
    return one.speedup is None or one.longer_length is not None or one.speedup >= WORTH_NAMING


def _on(asked: Asked, card: str, duration: Duration) -> OtherCard | None:
    try:
        there = asked.on_card(card)
        found = there.chosen
    except InputError:
        return None
    best = found.tried.candidate
    if not found.fits or best.speed is None:
        return None
    gpu, fits = there.target.spec, asked.chosen.fits
    schedule = make_schedule(
        there.request, best.setup, there.model, there.evaluator.examples, found.effective_batch_size
    )
    # A price that was asked for is that of the card asked for.
    takes = make_duration(best, schedule, there.target, None)
    if takes is None:
        return None
    return OtherCard(
        gpu=gpu.id,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=there.target.usable_bytes,
        setup=best.setup,
        peak_upper_bytes=best.peak_upper_bytes,
        tokens_per_second=best.speed.tokens_per_second,
        speedup=duration.hours / takes.hours if fits and takes.hours else None,
        longer_length=_longer(asked, there) if fits else None,
        hours=takes.hours,
        usd_per_gpu_hour=takes.usd_per_gpu_hour,
        usd=takes.usd,
        flags=f"--gpu {gpu.id}",
        # At which length it runs there is told with its speed where the plan's does not fit.
        changes=other_knobs(asked, found, () if fits else {"max_length"}),
    )


def _longer(asked: Asked, there: Asked) -> int | None:
    """The best length beyond the plan's that fits there and not here."""
    now = asked.chosen.tried.candidate.setup.max_length
    wished = [length for length in asked.lengths if length > now]
    open_ended = asked.stats is None and "max_length" not in asked.request.fixed
    if not wished and open_ended and 2 * now <= asked.model.max_position_embeddings:
        wished = [2 * now]
    return next((one for one in wished if not fits_at(asked, one) and fits_at(there, one)), None)
