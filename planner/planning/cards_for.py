"""Which card for a model and data: what a plan answers on each of those that people have or rent."""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.planning.asked import Asked
from planner.planning.schedule import make_duration, make_schedule
from planner.search.cards import CARDS
from planner.setup.training_setup import TrainingSetup

OWN = "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class CardAnswer:
    """What a plan answers on a card, of one GPU. `kind` is OWN or one of planner.search.cards.CARDS.

    Where nothing `fits`, `setup` and bytes are of the smallest tried, and there are no times. Hours and price
    are of the data, or of a million tokens without it; null where they are not known.
    """

    gpu: str
    name: str
    kind: str
    fits: bool
    setup: TrainingSetup
    usable_bytes: int
    peak_upper_bytes: int
    tokens_per_second: float | None = None
    hours: float | None = None
    hours_low: float | None = None
    hours_high: float | None = None
    usd_per_gpu_hour: float | None = None
    usd: float | None = None

    def in_time(self, hours: float) -> bool:
        """Whether it fits and is expected to be done within so many hours."""
        return self.fits and self.hours is not None and self.hours <= hours


def card_names() -> tuple[tuple[str, str], ...]:
    """Kind and name of each card that is asked about: one for each size, the desktop's first."""
    return tuple((kind, name) for kind, names in CARDS.items() for name in names)


def cards_for(asked: Asked) -> Iterator[CardAnswer]:
    """What a plan for the same request answers on each card; one that cannot run a fixed knob is left out.

    Made to be taken one by one: each is a search.
    """
    for kind, name in card_names():
        try:
            yield answer_of(asked.on_card(name), kind)
        except InputError:
            continue


def answer_of(there: Asked, kind: str) -> CardAnswer:
    """What a plan answers.

    Raises:
        InputError: what is fixed cannot be had there.
    """
    found = there.chosen
    best, target = found.tried.candidate, there.way.target
    duration = None
    if found.fits:
        examples = there.evaluator.examples
        schedule = make_schedule(there.request, best.setup, there.model, examples, found.effective_batch_size)
        duration = make_duration(best, schedule, target, there.request.price_usd_per_hour)
    return CardAnswer(
        gpu=target.spec.id,
        name=target.spec.name,
        kind=kind,
        fits=found.fits,
        setup=best.setup,
        usable_bytes=target.usable_bytes,
        peak_upper_bytes=best.peak_upper_bytes,
        tokens_per_second=best.tokens_per_second if found.fits else None,
        hours=None if duration is None else duration.hours,
        hours_low=None if duration is None else duration.hours_low,
        hours_high=None if duration is None else duration.hours_high,
        usd_per_gpu_hour=None if duration is None else duration.usd_per_gpu_hour,
        usd=None if duration is None else duration.usd,
    )
