"""Hours and price of a training run."""

from __future__ import annotations

from planner.base import validate
from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec

MAX_HOURS = 1e9
MAX_PRICE = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a run costs: `usd` for `gpu_count` GPUs over `hours` at `usd_per_gpu_hour`."""

    hours: float
    gpu_count: int
    usd_per_gpu_hour: float

    def __post_init__(self) -> None:
        validate.number("hours", self.hours, minimum=0.0, maximum=MAX_HOURS)
        validate.integer("gpu_count", self.gpu_count, minimum=1, maximum=2**14)
        validate.number("price", self.usd_per_gpu_hour, minimum=0.0, maximum=MAX_PRICE)

    @property
    def usd(self) -> float:
        """US dollars in all."""
        return self.hours * self.gpu_count * self.usd_per_gpu_hour


def hours_for(tokens: float, tokens_per_second: float) -> float:
    """Hours to train on so many tokens.

    Raises:
        FieldError: a number that is not finite, negative tokens or a rate of zero.
    """
    validate.number("tokens", tokens, minimum=0.0, maximum=1e18)
    validate.number("tokens_per_second", tokens_per_second, minimum=1e-9, maximum=1e15)
    return tokens / tokens_per_second / 3600


def run_cost(
    hours: float, gpu: GpuSpec, *, gpu_count: int = 1, usd_per_gpu_hour: float | None = None
) -> Cost | None:
    """Price a run at the given price, else at the catalog's offer for the card; None where neither is known.

    Raises:
        FieldError: a price, time or count that is not accepted.
    """
    price = gpu.price_usd_per_hour if usd_per_gpu_hour is None else usd_per_gpu_hour
    if price is None:
        return None
    return Cost(hours=hours, gpu_count=gpu_count, usd_per_gpu_hour=price)
