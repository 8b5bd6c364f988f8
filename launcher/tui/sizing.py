"""What the sizing screen shows for one setup, model and card: computed without a widget in sight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from launcher.tui.cards import Card
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.breakdown import REPLAYED
from planner.models.spec import ModelSpec
from planner.setup.card_limits import refuse_on_card
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import NoForecastError, StepEstimate, estimate_step


class Verdict(Enum):
    """Whether a setup fits: the interval's upper end does; only the expected peak does; neither does."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """The answer to one question, by the fitted estimate or, once refined, by the allocator's replay.

    `step` is None where no time can be told; `no_step` then says why. `asked_optim` is the optimizer that a
    search starts from: the setup's, or the one that a search has put the setup's in the place of.
    """

    setup: TrainingSetup
    model: ModelSpec
    card: Card
    memory: MemoryBreakdown
    step: StepEstimate | None
    asked_optim: str
    no_step: str = ""

    @property
    def refined(self) -> bool:
        """Whether the figures are those of `plan`: of torch's allocator, replayed."""
        return self.memory.basis.reserve == REPLAYED

    @property
    def searched_from(self) -> TrainingSetup:
        """The setup as a search starts from it."""
        return self.setup.replace(optim=self.asked_optim)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the largest phase."""
        return verdict(self.memory, self.card.usable_bytes)

    @property
    def headroom_bytes(self) -> int:
        """What the card leaves less the interval's upper end; negative by what is lacking."""
        return self.card.usable_bytes - self.memory.peak_upper_bytes


def verdict(memory: MemoryBreakdown, usable_bytes: int) -> Verdict:
    """Compare the peak and the interval's upper end with a card."""
    if memory.fits(usable_bytes):
        return Verdict.FITS
    return Verdict.TIGHT if memory.peak_bytes <= usable_bytes else Verdict.DOES_NOT_FIT


def size_up(setup: TrainingSetup, model: ModelSpec, card: Card, *, asked_optim: str | None = None) -> Sizing:
    """Answer for each card of the target, within milliseconds; several hold one process each.

    `asked_optim` is the sizing's, null for the setup's own.

    Raises:
        InputError: the setup is not possible for the model or on the card, or its memory is not modelled.
    """
    setup = on_all_cards(setup, card)
    refuse_on_card(setup.to_dict(), card.spec)
    run = TrainingRun(setup=setup, model=model)
    memory = estimate_memory(run, gpu=card.spec)
    step, no_step = None, ""
    try:
        step = estimate_step(run, card.spec)
    except NoForecastError as error:
        no_step = str(error)
    return Sizing(
        setup=setup,
        model=model,
        card=card,
        memory=memory,
        step=step,
        asked_optim=asked_optim or setup.optim,
        no_step=no_step,
    )


def refine(sizing: Sizing) -> Sizing:
    """The same answer with torch's allocator replayed, which takes tens of milliseconds.

    Raises:
        InputError: as size_up.
    """
    run = TrainingRun(setup=sizing.setup, model=sizing.model)
    memory = estimate_memory(run, gpu=sizing.card.spec, replay=True)
    return replace(sizing, memory=memory)


def on_all_cards(setup: TrainingSetup, card: Card) -> TrainingSetup:
    """The setup with one process a card."""
    if card.target.count == setup.num_processes:
        return setup
    distributed = "ddp" if card.target.count > 1 else None
    return setup.replace(num_processes=card.target.count, distributed=distributed)
