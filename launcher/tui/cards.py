"""Cards that the GPU picker offers: this machine's, plain sizes, and the catalog's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.tui.text import gib
from planner.base.errors import InputError, VramwiseError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.detect import local_gpus
from planner.gpus.parse import REFERENCE_CARDS
from planner.gpus.spec import GpuSpec
from planner.gpus.target import GpuTarget, alone, resolve_gpu, with_its_kind

DETECTED, SIZE, CATALOG = "this machine", "plain size", "catalog"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A card to size for, or several. `group` says where it comes from; `argument` is what `--gpu` takes,
    None for this machine's own, which shows `visible` GPUs.
    """

    target: GpuTarget
    group: str
    argument: str | None
    visible: int = 1

    @property
    def spec(self) -> GpuSpec:
        """The card's figures."""
        return self.target.spec

    @property
    def usable_bytes(self) -> int:
        """What the card leaves to the training process; of several that of this machine with most free."""
        return self.target.usable_bytes

    @property
    def environment(self) -> str:
        """What a shell has to set for `plan` to see this GPU alone; empty where it needs nothing."""
        if self.argument is not None or self.visible == 1 or self.target.count > 1:
            return ""
        return f"CUDA_VISIBLE_DEVICES={self.target.index}"

    def shared_by(self, num_processes: int) -> Card:
        """The card as a setup of so many processes has it: of all, the fullest decides."""
        return self if num_processes == 1 else replace(self, target=self.target.of_all())

    @property
    def title(self) -> str:
        """Short name for the screens."""
        if self.argument is not None:
            return self.argument
        if self.target.count > 1:
            return f"all {self.target.count} GPUs here: {self.spec.name}"
        return f"GPU {self.target.index} here: {self.spec.name}"

    @property
    def display(self) -> bool:
        """Whether a display is taken to be attached; what one holds of this machine's own GPU is counted."""
        return self.argument is not None and self.target.held_bytes > 0

    @property
    def held(self) -> str:
        """What of the card's memory others hold and who they are; empty where nobody does."""
        if not self.target.held_bytes:
            return ""
        return f"{gib(self.target.held_bytes)} held by " + ("a display" if self.display else "others now")

    @property
    def detail(self) -> str:
        """The card behind a size, or the name behind an id."""
        many = f"{self.target.count} x " if self.target.count > 1 else ""
        return f"{many}{self.spec.name}"


def first_card(text: str | None, fallback: str, *, display: bool = False) -> Card:
    """The card that is asked for; else this machine's with most memory free, with all of its kind; else the
    fallback. What a `display` takes is left out but for this machine's, where it is counted.

    Raises:
        InputError: the text names no card.
    """
    if text is not None:
        return card_from_text(text, display=display)
    here = detected_cards()
    if not here:
        return card_from_text(fallback, display=display)
    return max(here, key=lambda card: (card.usable_bytes, card.target.count))


def detected_cards() -> tuple[Card, ...]:
    """This machine's GPUs: all of each kind that there are several of, then each alone; empty without any."""
    try:
        gpus = local_gpus()
    except VramwiseError:
        return ()
    emptiest: dict[str, int] = {}
    for at in sorted(range(len(gpus)), key=lambda at: -gpus[at].free_bytes):
        emptiest.setdefault(gpus[at].spec.id, at)
    kinds = [with_its_kind(gpus, at) for at in emptiest.values()]
    single = [alone(gpus, at) for at in range(len(gpus))]
    return tuple(
        Card(target=target, group=DETECTED, argument=None, visible=len(gpus))
        for target in (*(kind for kind in kinds if kind.count > 1), *single)
    )


def visible_gpus() -> int:
    """How many GPUs a run that is started now would see."""
    try:
        return len(local_gpus())
    except VramwiseError:
        return 0


def offered() -> tuple[Card, ...]:
    """Every card to pick from: detected first."""
    return detected_cards() + catalog_cards()


def catalog_cards() -> tuple[Card, ...]:
    """Plain sizes, then every card of the catalog by its usable memory."""
    sizes = [card_from_text(f"{size}GB") for size in REFERENCE_CARDS]
    catalog = sorted(gpu_catalog(), key=lambda gpu: (gpu.usable_bytes, gpu.id))
    return (*sizes, *(card_from_text(gpu.id) for gpu in catalog))


def card_from_text(text: str, *, display: bool = False) -> Card:
    """The card that a `--gpu` argument names.

    Raises:
        InputError: it names none.
    """
    target = resolve_gpu(text, display=display)
    return Card(target=target, group=SIZE if target.reference else CATALOG, argument=text.strip())


def card_of(target: GpuTarget) -> Card | None:
    """The card that something was planned for; this machine's own as it is now. None where it is no more."""
    if target.index is not None:
        same = (card for card in detected_cards() if card.target.index == target.index)
        return next((card for card in same if card.target.count == target.count), None)
    try:
        return card_from_text(target.text, display=target.held_bytes > 0)
    except InputError:
        return None


def attached(card: Card, *, display: bool) -> Card:
    """The same card with a display or without; this machine's own is what it is."""
    if card.argument is None or card.display == display:
        return card
    return card_from_text(card.argument, display=display)
