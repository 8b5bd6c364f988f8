"""Verdicts beside published outcomes: `python -m benchmarks.published_outcomes`, for docs/other-trainers.md.

What is stated of a config (a card on which it runs or does not, or what it takes) is in
published_outcomes.toml with its source. A stated size is compared as a verdict too: on how many sizes of card
both say the same.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.gpus.target import resolve_gpu
from planner.memory.breakdown import MemoryBreakdown
from planner.planning.estimation import Estimator
from planner.trainers.files import TRAINERS

OUTCOMES = Path(__file__).with_suffix(".toml")
SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80)
"""Cards in GB that a stated size is a verdict on."""
_HEAD = """| config | stated | said | on the card | on all sizes |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A published outcome. `cards` are those that it is of, with whether it runs there; `stated_bytes` is
    what it is said to take (null: not said).
    """

    trainer: str
    config: str
    source: str
    stated: str
    cards: dict[str, bool]
    settings: dict[str, Any]
    stated_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is said of an outcome's config: memory on its card, or on one of 80 GB, and by card and size
    whether it is said to fit, and whether it does.
    """

    outcome: Outcome
    memory: MemoryBreakdown
    on_cards: dict[str, tuple[bool, bool]]
    on_sizes: dict[int, tuple[bool, bool]]

    @property
    def agrees(self) -> bool:
        """Whether the verdict is right on every card that was named."""
        return all(said == is_so for said, is_so in self.on_cards.values())


def outcomes() -> tuple[Outcome, ...]:
    """Those of the file."""
    return tuple(Outcome(**one) for one in tomllib.loads(OUTCOMES.read_text(encoding="utf-8"))["outcome"])


def verdicts() -> Iterator[Verdict]:
    """What is said of each."""
    for one in outcomes():
        fits = {card: (_estimated(one, card)[1], is_so) for card, is_so in one.cards.items()}
        memory, _ = _estimated(one, next(iter(one.cards), "80GB"))
        sizes = {}
        if one.stated_bytes is not None:
            for size in SIZES:
                usable = resolve_gpu(f"{size}GB").usable_bytes
                sizes[size] = (memory.fits(usable), one.stated_bytes <= usable)
        yield Verdict(outcome=one, memory=memory, on_cards=fits, on_sizes=sizes)


def _estimated(one: Outcome, card: str) -> tuple[MemoryBreakdown, bool]:
    target = resolve_gpu(card)
    config = TRAINERS[one.trainer].read(one.settings, auto_dtype=target.spec.dtype, gpus=1)
    found = Estimator(target, stack=config.stack).estimate(config.setup)
    return found.memory, found.fits


def table() -> str:
    """A row for each outcome, and how many agree."""
    found = list(verdicts())
    named = [pair for one in found for pair in one.on_cards.values()]
    sized = [pair for one in found for pair in one.on_sizes.values()]
    right = [sum(said == is_so for said, is_so in pairs) for pairs in (named, sized)]
    told = (
        f"Of {len(found)} configs, {right[0]} of {len(named)} verdicts on named cards agree, and of the "
        f"stated sizes {right[1]} of {len(sized)} as verdicts on cards of {SIZES[0]} to {SIZES[-1]} GB.\n"
    )
    return f"{told}\n{_HEAD}{''.join(map(_row, found))}"


def _row(one: Verdict) -> str:
    outcome, memory = one.outcome, one.memory
    name = outcome.config.replace("axolotl-ai-cloud/axolotl at 067b021c, examples/", "")
    said = f"{memory.peak_bytes / 2**30:.1f} GiB, at most {memory.peak_upper_bytes / 2**30:.1f}"
    cards = "; ".join(
        f"{card}: {'fits' if fits else 'does not fit'}{'' if fits == is_so else ' (**not so**)'}"
        for card, (fits, is_so) in one.on_cards.items()
    )
    agreeing = sum(fits == is_so for fits, is_so in one.on_sizes.values())
    sizes = f"{agreeing} of {len(one.on_sizes)}" if one.on_sizes else ""
    return f"| `{name}` ({outcome.trainer}) | {outcome.stated} | {said} | {cards} | {sizes} |\n"


if __name__ == "__main__":
    print(table())
