"""Intervals of forecasts for cards of which nothing was measured, by class of card.

None of the published runs (profiles/external_runs.jsonl) is fitted, so all of them are held out: an interval
covers those of its class, and is wider where all of them come from one source or there are none.
"""

from __future__ import annotations

from planner.gpus.card_class import CardClass, card_class
from planner.gpus.spec import GpuSpec
from planner.models.spec import ModelSpec

Interval = tuple[float, float]

LEAST: Interval = (0.65, 1.5)
"""Factors on a forecast: no class has less. 62 runs of Ampere cards by four sources, of A100 with 40 and 80
GB and RTX 3090, need 0.92 to 1.51; one of them lies outside."""
FEW_SOURCES: Interval = (0.55, 1.65)
"""Where runs are of one source or of a few cards. 12 runs on a T4, of one source, need 0.88 to 1.34, or 0.69
to 1.33 if they are forecast for this stack and not for the plain loop that ran; GPU-bound runs on Ada, 1.09
to 1.20, are of RTX 4090 alone, and power holds an L4 in ways that no run tells."""
BY_CLASS: dict[CardClass, Interval] = {"Ampere": LEAST, "Hopper": LEAST}
"""What steps that the GPU decides need, Hopper's cards being of the architecture that the rates are of;
FEW_SOURCES for every other class."""
HOST_UNKNOWN: Interval = (0.5, 1.8)
"""What steps that the host decides need, whatever the card: 0.88 to 1.67 on an L40S, 1.20 on an A100 40GB.
Hosts of one rented kind differ by 1.6 times alone (host_block_seconds of profiles/runs)."""

TRACED: Interval = FEW_SOURCES
"""What a model without a recipe needs: no rate was fitted to one, and mixtures are forecast too fast by up to
1.8 times (docs/throughput.md)."""
LOOPS: Interval = HOST_UNKNOWN
"""Where it has functions that a fused kernel may compute, counted as transformers' reference in torch runs
them: seven runs of three families on an H200, which no rate was fitted to, need 0.84 to 1.31."""
UNCOUNTED: Interval = (0.1, HOST_UNKNOWN[1])
"""Where such functions were traced as one operation and nothing is known of what they launch: their reference
launches hundreds of kernels in a loop over chunks of tokens."""


def traced_interval(model: ModelSpec, interval: Interval) -> Interval:
    """An interval widened for what no run has shown of a model that was traced."""
    if not model.is_traced:
        return interval
    least = TRACED
    if model.unseen_kernels:
        blocks = [layer.traced for layer in model.layers if layer.traced is not None]
        uncounted = any(block.unseen and block.loops is None for block in blocks)
        least = UNCOUNTED if uncounted else LOOPS
    return min(interval[0], least[0]), max(interval[1], least[1])


def published_interval(gpu: GpuSpec, bound_by: str) -> Interval:
    """The interval of a card whose rates follow from published figures, for a step that waits for "compute",
    "bandwidth" or "launches".
    """
    if bound_by == "launches":
        return HOST_UNKNOWN
    return BY_CLASS.get(card_class(gpu), FEW_SOURCES)
