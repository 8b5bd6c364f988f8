"""Claim: what somebody states of a model on a card, and what is found of each of its figures."""

from __future__ import annotations

from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass
from planner.setup.knob import KnobValue
from planner.setup.training_setup import TrainingSetup

MEMORY = "memory"
WEIGHTS = "weights"
SPEED = "tokens_per_second"
TIME = "hours"
CARD = "card"
KINDS: dict[str, str] = {
    MEMORY: "bytes",
    WEIGHTS: "bytes",
    SPEED: "tokens a second",
    TIME: "hours",
    CARD: "bytes",
}
"""What a figure is of, with its unit; a card's is how many bytes it leaves."""

POSSIBLE = "possible"
TIGHT = "tight"
BEYOND = "beyond the card"
VERDICTS = (POSSIBLE, TIGHT, BEYOND)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A stated figure, `written` as it was. `low` and `high` are the ends of a range, half a unit of the last
    digit beyond what was written: 11.8 is anything from 11.75 to 11.85.

    Raises:
        FieldError: the range is empty or below zero.
    """

    kind: str
    written: str
    low: float
    high: float

    def __post_init__(self) -> None:
        validate.choice("figure", self.kind, KINDS)
        validate.number(self.kind, self.low, minimum=0.0, maximum=1e18)
        validate.number(self.kind, self.high, minimum=self.low, maximum=1e18)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What is claimed: figures of `model` on `gpu` (null: no card is named) with `knobs` as stated.

    `tokens` are those that the hours are for, null where it states none. `unread` are the words with digits
    that say nothing that is understood here.

    Raises:
        InputError: no figure and no card to judge, or hours of an unknown number of tokens.
    """

    text: str
    model: str
    gpu: str | None
    knobs: tuple[tuple[str, KnobValue], ...]
    figures: tuple[Figure, ...]
    tokens: float | None = None
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        validate.text("model", self.model)
        if not self.figures and self.gpu is None:
            raise InputError("the claim has neither a figure nor a card: nothing can be judged")
        for figure in self.figures:
            if figure.kind in (SPEED, TIME) and self.gpu is None:
                raise InputError(f"{figure.written}: a speed needs a card (on a 4090, or --gpu)")
            if figure.kind == TIME and self.tokens is None:
                raise InputError(
                    f"{figure.written}: a time needs the work it is for: examples, epochs and their length "
                    "(1,000 examples of 2,048 tokens, 3 epochs)"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedFigure:
    """A figure with its verdict and the true one: `expected` with its interval, in the figure's unit.

    `limit` is what cannot be passed: the least bytes, the most tokens a second, the fewest hours. Null stands
    for a figure that does not exist, such as the speed of what does not fit. `setup` is what the true figure
    is of.
    """

    figure: Figure
    verdict: str
    reason: str
    expected: float | None
    expected_low: float | None
    expected_high: float | None
    limit: float | None
    setup: TrainingSetup | None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise FieldError("verdict", self.verdict, "one of " + ", ".join(VERDICTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedClaim:
    """A claim with all its figures judged, on the card that it was judged on."""

    claim: Claim
    gpu: str
    figures: tuple[JudgedFigure, ...]

    @property
    def is_beyond(self) -> bool:
        """Whether any figure is beyond the card."""
        return any(one.verdict == BEYOND for one in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the contract of `vramwise check --json`."""
        from planner.base.json_codec import encode

        claim = self.claim
        return {
            "text": claim.text,
            "model": claim.model,
            "gpu": self.gpu,
            "gpu_stated": claim.gpu is not None,
            "knobs": {name: encode(value) for name, value in claim.knobs},
            "tokens": claim.tokens,
            "unread": list(claim.unread),
            "figures": [
                {
                    **encode(one.figure),
                    "unit": KINDS[one.figure.kind],
                    "verdict": one.verdict,
                    "reason": one.reason,
                    "expected": one.expected,
                    "expected_low": one.expected_low,
                    "expected_high": one.expected_high,
                    "limit": one.limit,
                    "setup": None if one.setup is None else one.setup.to_dict(),
                }
                for one in self.figures
            ],
        }
