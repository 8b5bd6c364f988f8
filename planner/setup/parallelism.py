"""Parallelism: how many GPUs a run has, and how they share its work."""

from __future__ import annotations

from planner.base.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """`num_processes` GPUs, one process each; `strategy` is "ddp" or "fsdp", null for one GPU."""

    num_processes: int
    strategy: str | None

    @property
    def is_single(self) -> bool:
        """Whether one GPU does it all."""
        return self.num_processes == 1


ONE_GPU = Parallelism(num_processes=1, strategy=None)
