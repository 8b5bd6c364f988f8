"""Classes of cards: of one architecture each, which forecasts of cards without runs are alike for."""

from __future__ import annotations

from typing import Literal, get_args

from planner.gpus.spec import GpuSpec

CardClass = Literal["before Turing", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"]
CARD_CLASSES: tuple[CardClass, ...] = get_args(CardClass)
_FROM: tuple[tuple[tuple[int, int], CardClass], ...] = (
    ((10, 0), "Blackwell"),
    ((9, 0), "Hopper"),
    ((8, 9), "Ada"),
    ((8, 0), "Ampere"),
    ((7, 5), "Turing"),
    ((0, 0), "before Turing"),
)


def card_class(gpu: GpuSpec) -> CardClass:
    """A card's class, by its compute capability."""
    return next(name for least, name in _FROM if gpu.compute_capability >= least)
