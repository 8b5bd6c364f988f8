"""What the sizing screen shows for one setup, model and card: computed without a widget in sight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from launcher.tui.cards import Card
from launcher.tui.dataset import Dataset
from launcher.tui.text import gib
from planner.answers.plan import DataSummary, Duration, Schedule
from planner.base.errors import InputError
from planner.data.lengths import Packing, Padding
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.breakdown import REPLAYED
from planner.models.spec import ModelSpec
from planner.search.evaluator import Evaluator
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, refuse_on_card
from planner.setup.defaults import FASTER_OPTIM, OPTIM
from planner.setup.methods import as_stored, experts_held
from planner.setup.parallelism import DDP, FSDP
from planner.setup.training_setup import TrainingSetup
from planner.text.ways import WAY_TITLES
from planner.throughput import NoForecastError, StepEstimate, estimate_step


class Verdict(Enum):
    """Whether a setup fits: the interval's upper end does; only the expected peak does; neither does."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What is asked beside model, card and setup: data, passes over it, and a price of one's own; null stands
    for none, the usual number, and the catalog's price.
    """

    data: Dataset | None = None
    num_train_epochs: float | None = None
    usd_per_gpu_hour: float | None = None


NO_WISHES = Wishes()


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeRun:
    """What a run on the data comes to, as a plan for it says. `padding` and `packing` are what either
    comes to, whichever of them the setup does. `duration` is null without a forecast.
    """

    data: DataSummary
    schedule: Schedule
    duration: Duration | None
    padding: Padding
    packing: Packing


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """The answer to one question, by the fitted estimate or, once refined, by the allocator's replay.

    `step` is None where no time can be told; `no_step` then says why. `asked_optim` is the optimizer that a
    search starts from: the setup's, or the one that a search has put the setup's in the place of. `ways` are
    the others to use several cards, in words. `run` is null until it is refined, without data, and where none
    of the data can be trained, which `no_run` then says.
    """

    setup: TrainingSetup
    model: ModelSpec
    card: Card
    memory: MemoryBreakdown
    step: StepEstimate | None
    asked_optim: str
    no_step: str = ""
    ways: tuple[str, ...] = ()
    wishes: Wishes = NO_WISHES
    run: WholeRun | None = None
    no_run: str = ""

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


def size_up(
    setup: TrainingSetup,
    model: ModelSpec,
    card: Card,
    *,
    asked_optim: str | None = None,
    wishes: Wishes = NO_WISHES,
) -> Sizing:
    """Answer within milliseconds. Of several cards, the way to use them that is fastest of those that fit,
    else the one that needs least; `ways` then has what the others come to.

    `asked_optim` is the sizing's, null for the setup's own.

    Raises:
        InputError: the setup is not possible for the model or on the card, or its memory is not modelled.
    """
    # As a plan takes it: the form has no row for it.
    setup = as_stored(setup.replace(experts=experts_held(setup, model)), model)
    refuse_on_card(setup.to_dict(), card.spec, (*CARD_LIMITS, BFLOAT16))
    answers, refused = [], None
    for way in ways(setup, card):
        try:
            answers.append(_size_up(way, model, card, asked_optim, wishes))
        except InputError as error:
            refused = refused or error
    if not answers:
        raise refused or InputError("there is no way to use these cards")
    best = max(answers, key=_worth)
    if len(answers) == 1:
        return best
    return replace(best, ways=tuple(way_of(one) for one in answers if one is not best))


def evaluator_of(model: ModelSpec, card: Card, wishes: Wishes) -> Evaluator:
    """What a plan for the card and the data evaluates setups by."""
    examples = None if wishes.data is None else wishes.data.examples
    return Evaluator(model, card.spec, card.usable_bytes, examples=examples)


def _size_up(
    setup: TrainingSetup, model: ModelSpec, card: Card, asked_optim: str | None, wishes: Wishes
) -> Sizing:
    card = card.shared_by(setup.num_processes)
    run = evaluator_of(model, card, wishes).run(setup)
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
        wishes=wishes,
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
    run = evaluator_of(sizing.model, sizing.card, sizing.wishes).run(sizing.setup)
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
