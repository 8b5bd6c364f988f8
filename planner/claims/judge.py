"""Judging a claim: each figure against the setup that favours it most.

What a claim leaves open is chosen in its favour: for memory the setup that needs least of all that a plan
tries, for speed the fastest that fits the card. Verdicts, for every figure:

- `possible`: the figure is within what the models expect of that setup.
- `tight`: it lies between the expected figure's interval and what cannot be passed.
- `beyond the card`: it is past what cannot be passed. For memory and the card that is the lower end of the
  leanest setup's interval, for weights their bytes, for speed and time the rate that matmuls and weights
  alone allow at the card's published rates. The speed of what does not fit on the card is beyond it too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.claims.claim import (
    BEYOND,
    CARD,
    MEMORY,
    POSSIBLE,
    SPEED,
    TIGHT,
    WEIGHTS,
    Claim,
    Figure,
    JudgedClaim,
    JudgedFigure,
)
from planner.gpus.parse import REFERENCE_CARDS
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.memory.breakdown import MemoryBreakdown
from planner.models.catalog import Inspector, resolve_model
from planner.planning.asked import Asked
from planner.planning.ways import with_processes
from planner.search.evaluator import Candidate
from planner.search.lean import leanest
from planner.setup.request import PlanRequest
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.roofline import estimate_step

_GIB = 2**30
_UNCHECKPOINTED = {
    "gradient_checkpointing": False,
    "checkpointed_layers": None,
    "selective_checkpointing": False,
    "activation_memory_budget": None,
    "activation_offloading": False,
    "compile": "none",
}
"""A setup that computes nothing twice: that with the highest roofline."""
_MANY = 64
"""Sequences of a micro-batch at which reading the weights bounds no rate."""


def judge(claim: Claim, *, allow_network: bool = False, inspector: Inspector | None = None) -> JudgedClaim:
    """Judge all figures of a claim, and whether it fits where it names a card.

    Raises:
        InputError: model, card or knobs are not usable, or the card's rates are unknown.
    """
    target = resolve_gpu(_card(claim))
    request = PlanRequest(model=claim.model, gpu=target.text, knobs=claim.knobs)
    model = resolve_model(claim.model, allow_network=allow_network, inspector=inspector)
    judge = _Judge(Asked(request, with_processes(request, target), model), claim)
    figures = [judge.figure(one) for one in claim.figures]
    if claim.gpu is not None:
        figures.append(judge.card())
    return JudgedClaim(claim=claim, gpu=target.text.strip(), figures=tuple(figures))


def _card(claim: Claim) -> str:
    """The card that is named, else the smallest reference card with the stated memory, else the largest."""
    if claim.gpu is not None:
        return claim.gpu
    stated = max(figure.high for figure in claim.figures)
    size = next((size for size in REFERENCE_CARDS if size * _GIB >= stated), max(REFERENCE_CARDS))
    return REFERENCE_CARDS[size]


@dataclass(frozen=True, slots=True)
class _Leanest:
    """The setup that needs least, where it would run, and its memory with the allocator replayed."""

    setup: TrainingSetup
    memory: MemoryBreakdown
    target: GpuTarget


class _Judge:
    """Judges the figures of one claim; what is asked of the models is asked once."""

    def __init__(self, asked: Asked, claim: Claim) -> None:
        self.asked = asked
        self.claim = claim
        self.leanest = _leanest(asked)

    def figure(self, figure: Figure) -> JudgedFigure:
        """Judge one figure of the claim."""
        if figure.kind == WEIGHTS:
            return self._weights(figure)
        if figure.kind == MEMORY:
            return self._memory(figure)
        return self._rate(figure)

    def card(self) -> JudgedFigure:
        """Judge whether the card takes the leanest setup."""
        usable = float(self.leanest.target.usable_bytes)
        written = f"fits on {self.leanest.target.text.strip()}"
        return self._memory(Figure(kind=CARD, written=written, low=usable, high=usable))

    def _weights(self, figure: Figure) -> JudgedFigure:
        held = float(self.leanest.memory.weights_bytes)
        right = figure.high >= held
        return JudgedFigure(
            figure=figure,
            verdict=POSSIBLE if right else BEYOND,
            reason=(
                "what is loaded, quantised and not, takes no more"
                if right
                else "embeddings, head and norms are loaded in 16 bits beside what is quantised"
                if self.leanest.setup.method == "qlora"
                else "the parameters take more in this dtype"
            ),
            expected=held,
            expected_low=held,
            expected_high=held,
            limit=held,
            setup=self.leanest.setup,
        )

    def _memory(self, figure: Figure) -> JudgedFigure:
        memory = self.leanest.memory
        lower, expected, upper = memory.peak_lower_bytes, memory.peak_bytes, memory.peak_upper_bytes
        # A card is to take the whole interval, as in a plan; a stated peak is met by what is expected.
        enough = upper if figure.kind == CARD else expected
        verdict = POSSIBLE if figure.high >= enough else TIGHT if figure.high >= lower else BEYOND
        return JudgedFigure(
            figure=figure,
            verdict=verdict,
            reason=_memory_reason(verdict, self.leanest.setup, self._open),
            expected=float(expected),
            expected_low=float(lower),
            expected_high=float(upper),
            limit=float(lower),
            setup=self.leanest.setup,
        )

    def _rate(self, figure: Figure) -> JudgedFigure:
        """Judge a speed, or a time, which is a speed by the claim's tokens."""
        roofline = self._roofline()
        fast = self._fastest()
        # Of a range the end that favours the claim: the slower.
        tokens = self.claim.tokens
        in_unit = _as_is if figure.kind == SPEED or tokens is None else partial(_hours, tokens)
        needed = figure.low if in_unit is _as_is else _hours(tokens or 0.0, figure.high) or 0.0
        if fast is None or fast.speed is None:
            verdict, reason = BEYOND, "nothing as claimed fits on the card"
            low = expected = high = None
        else:
            low, expected = fast.speed.tokens_per_second_low, fast.speed.tokens_per_second
            high = fast.speed.tokens_per_second_high
            verdict = POSSIBLE if needed <= high else TIGHT if needed <= roofline else BEYOND
            what = _in_words(fast.setup, self._open)
            reason = {
                POSSIBLE: f"within the forecast of the fastest setup that fits: {what}",
                TIGHT: "above the forecast, below what the card's published rates allow",
                BEYOND: f"{needed / roofline:.1f} times what the card's published rates allow for this work",
            }[verdict]
        ends = (in_unit(low), in_unit(high))
        return JudgedFigure(
            figure=figure,
            verdict=verdict,
            reason=reason,
            expected=in_unit(expected),
            expected_low=ends[0] if figure.kind == SPEED else ends[1],
            expected_high=ends[1] if figure.kind == SPEED else ends[0],
            limit=in_unit(roofline),
            setup=None if fast is None else fast.setup,
        )

    @property
    def _open(self) -> frozenset[str]:
        """Knobs that the claim leaves open."""
        return (
            frozenset({"activation_offloading", "gradient_checkpointing"}) - self.asked.request.fixed.keys()
        )

    def _fastest(self) -> Candidate | None:
        chosen = self.asked.chosen
        return chosen.tried.candidate if chosen.fits else None

    def _roofline(self) -> float:
        """Tokens a second that no run as claimed exceeds.

        Raises:
            NoForecastError: the card's rates are unknown.
        """
        setup = self.leanest.setup
        fixed = self.asked.request.fixed
        free: dict[str, Any] = {name: value for name, value in _UNCHECKPOINTED.items() if name not in fixed}
        if "per_device_train_batch_size" not in fixed:
            free["per_device_train_batch_size"] = _MANY
        run = TrainingRun(setup=setup.replace(**free), model=self.asked.model)
        # GPUs share the work at best without a word: as many as are there times what one can.
        count = self.asked.target.count // setup.num_processes
        return estimate_step(run, self.asked.target.spec).roofline_tokens_per_second * max(1, count)


def _leanest(asked: Asked) -> _Leanest:
    found: list[_Leanest] = []
    refused: InputError | None = None
    for way in asked.ways:
        try:
            setups = list(
                leanest(
                    way.base,
                    way.evaluator,
                    effective_batch_size=way.effective_batch_size,
                    fixed=way.request.fixed,
                )
            )
        except InputError as error:
            refused = error
            continue
        fitted = min(setups, key=lambda one: way.evaluator.fitted(one).peak_bytes, default=None)
        if fitted is not None:
            memory = way.evaluator.confirm(fitted, whole=True).memory
            found.append(_Leanest(fitted, memory, way.target))
    if not found:
        raise refused or InputError("no setup as claimed is modelled")
    return min(found, key=lambda one: one.memory.peak_bytes)


def _memory_reason(verdict: str, setup: TrainingSetup, left_open: frozenset[str]) -> str:
    what = _in_words(setup, left_open)
    return {
        POSSIBLE: f"the leanest setup needs no more: {what}",
        TIGHT: f"within the interval of the leanest setup, {what}",
        BEYOND: f"the leanest setup needs more: {what}",
    }[verdict]


def _in_words(setup: TrainingSetup, left_open: frozenset[str]) -> str:
    """A setup by what matters: length, micro-batch, and what layers keep where the claim left that open."""
    words = [f"{setup.max_length:,} tokens", f"micro-batch {setup.per_device_train_batch_size}"]
    if setup.gradient_checkpointing and "gradient_checkpointing" in left_open:
        words.append("checkpointed")
    if setup.activation_offloading and "activation_offloading" in left_open:
        words.append("layer inputs on the host")
    if setup.num_processes > 1:
        words.append(f"{setup.distributed} on {setup.num_processes} GPUs")
    return ", ".join(words)


def _as_is(rate: float | None) -> float | None:
    return rate


def _hours(tokens: float, rate: float | None) -> float | None:
    """Hours for tokens at so many a second; as well the rate at which they take so many hours."""
    return None if not rate else tokens / rate / 3600
