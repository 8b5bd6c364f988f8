"""Cards that the GPU picker offers: this machine's, plain sizes, and the catalog's."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.tui.text import gib
from planner.base.errors import InputError, VramwiseError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.detect import LocalGpu, local_gpus
from planner.gpus.parse import REFERENCE_CARDS
from planner.gpus.spec import GpuSpec
from planner.gpus.target import GpuTarget, resolve_gpu

DETECTED, SIZE, CATALOG = "this machine", "plain size", "catalog"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A card to size for. `group` says where it comes from; `argument` is what `--gpu` takes, None for this
    machine's own GPU.
    """

    target: GpuTarget
    group: str
    argument: str | None

    @property
    def spec(self) -> GpuSpec:
        """The card's figures."""
        return self.target.spec

    @property
    def usable_bytes(self) -> int:
        """What the card leaves to the training process."""
        return self.target.usable_bytes

    @property
    def title(self) -> str:
        """Short name for the screens."""
        if self.argument is None:
            return f"GPU {self.target.index} here: {self.spec.name}"
        return self.argument

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
    """The card that is asked for; else this machine's with most memory free; else the fallback. What a
    `display` takes is left out but for this machine's, where it is counted.

    Raises:
        InputError: the text names no card.
    """
    if text is not None:
        return card_from_text(text, display=display)
    here = detected_cards()
    if here:
        return max(here, key=lambda card: card.usable_bytes)
    return card_from_text(fallback, display=display)


def detected_cards() -> tuple[Card, ...]:
    """This machine's GPUs; empty without any."""
    try:
        return tuple(_local(gpu, position) for position, gpu in enumerate(local_gpus()))
    except VramwiseError:
        return ()


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
        return next((card for card in detected_cards() if card.target.index == target.index), None)
    try:
        return card_from_text(target.text, display=target.held_bytes > 0)
    except InputError:
        return None


def attached(card: Card, *, display: bool) -> Card:
    """The same card with a display or without; this machine's own is what it is."""
    if card.argument is None or card.display == display:
        return card
    return card_from_text(card.argument, display=display)


def _local(gpu: LocalGpu, position: int) -> Card:
    target = GpuTarget(
        text=gpu.spec.id,
        spec=gpu.spec,
        count=1,
        usable_bytes=gpu.free_bytes,
        held_bytes=gpu.spec.usable_bytes - gpu.free_bytes,
        index=gpu.index,
        position=position,
        notes=("what other processes hold is counted",),
    )
    return Card(target=target, group=DETECTED, argument=None)
