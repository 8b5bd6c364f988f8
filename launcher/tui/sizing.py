"""What the sizing screen shows for one setup, model and card: computed without a widget in sight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from launcher.tui.cards import Card
from launcher.tui.text import gib
from planner.base.errors import InputError
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.breakdown import REPLAYED
from planner.models.spec import ModelSpec
from planner.setup.card_limits import refuse_on_card
from planner.setup.defaults import FASTER_OPTIM, OPTIM
from planner.setup.methods import experts_held
from planner.setup.parallelism import DDP, FSDP
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.text.ways import WAY_TITLES
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
    search starts from: the setup's, or the one that a search has put the setup's in the place of. `ways` are
    the others to use several cards, in words.
    """

    setup: TrainingSetup
    model: ModelSpec
    card: Card
    memory: MemoryBreakdown
    step: StepEstimate | None
    asked_optim: str
    no_step: str = ""
    ways: tuple[str, ...] = ()

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
    """Answer within milliseconds. Of several cards, the way to use them that is fastest of those that fit,
    else the one that needs least; `ways` then has what the others come to.

    `asked_optim` is the sizing's, null for the setup's own.

    Raises:
        InputError: the setup is not possible for the model or on the card, or its memory is not modelled.
    """
    # As a plan takes it: the form has no row for it.
    setup = setup.replace(experts=experts_held(setup, model))
    refuse_on_card(setup.to_dict(), card.spec)
    answers, refused = [], None
    for way in ways(setup, card):
        try:
            answers.append(_size_up(way, model, card, asked_optim))
        except InputError as error:
            refused = refused or error
    if not answers:
        raise refused or InputError("there is no way to use these cards")
    best = max(answers, key=_worth)
    if len(answers) == 1:
        return best
    return replace(best, ways=tuple(way_of(one) for one in answers if one is not best))


def _size_up(setup: TrainingSetup, model: ModelSpec, card: Card, asked_optim: str | None) -> Sizing:
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
        # Sharing the weights out has an optimizer of its own.
        asked_optim=setup.optim if setup.distributed == FSDP else asked_optim or setup.optim,
        no_step=no_step,
    )


def _worth(sizing: Sizing) -> tuple[bool, float, int]:
    """Whether it fits; then how fast it is, and how little it needs."""
    if sizing.verdict is Verdict.DOES_NOT_FIT:
        return False, 0.0, -sizing.memory.peak_upper_bytes
    rate = 0.0 if sizing.step is None else sizing.step.tokens_per_second
    return True, rate, -sizing.memory.peak_upper_bytes


def way_of(sizing: Sizing) -> str:
    """A way to use several cards, in a few words."""
    title = WAY_TITLES[sizing.setup.distributed]
    if sizing.verdict is Verdict.DOES_NOT_FIT:
        return f"{title} lacks {gib(-sizing.headroom_bytes)}"
    return title if sizing.step is None else f"{title} {sizing.step.tokens_per_second:,.0f} tokens/s"


def refine(sizing: Sizing) -> Sizing:
    """The same answer with torch's allocator replayed, which takes tens of milliseconds.

    Raises:
        InputError: as size_up.
    """
    run = TrainingRun(setup=sizing.setup, model=sizing.model)
    memory = estimate_memory(run, gpu=sizing.card.spec, replay=True)
    return replace(sizing, memory=memory)


def ways(setup: TrainingSetup, card: Card) -> tuple[TrainingSetup, ...]:
    """The setup on one of the cards and on all of them; as it is where it says how they share the work."""
    count = card.target.count
    if count == setup.num_processes:
        return (setup,)
    sharded = setup.replace(num_processes=count, distributed=FSDP)
    if setup.optim == OPTIM:
        # What is taken where none was asked for cannot update shares.
        sharded = sharded.replace(optim=FASTER_OPTIM)
    one = setup.replace(num_processes=1, distributed=None)
    return one, setup.replace(num_processes=count, distributed=DDP), sharded
