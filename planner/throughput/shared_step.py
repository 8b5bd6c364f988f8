"""SharedStep: what is told of a step of several GPUs."""

from __future__ import annotations

from planner.base.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedStep:
    """What GPUs say to each other. `link` says in words how they are joined; `received_bytes` come to each
    in an optimizer step, over a link of `bytes_per_second` each way, in an interval. `scaling` is the rate of
    all over that of one GPU by itself with the same micro-batch, were its memory large enough; `waiting` the
    share of a step that they cost.
    """

    link: str
    received_bytes: float
    bytes_per_second: float
    bytes_per_second_low: float
    bytes_per_second_high: float
    scaling: float
    waiting: float
