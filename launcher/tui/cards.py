"""Cards that the GPU picker offers: this machine's, plain sizes, and the catalog's."""

from __future__ import annotations

from dataclasses import dataclass

from planner.base.errors import VramwiseError
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
    def detail(self) -> str:
        """The card behind a size, or the name behind an id."""
        many = f"{self.target.count} x " if self.target.count > 1 else ""
        return f"{many}{self.spec.name}"


def first_card(text: str | None, fallback: str) -> Card:
    """The card that is asked for; else this machine's with most memory free; else the fallback.

    Raises:
        InputError: the text names no card.
    """
    if text is not None:
        return card_from_text(text)
    here = detected_cards()
    return max(here, key=lambda card: card.usable_bytes) if here else card_from_text(fallback)


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
