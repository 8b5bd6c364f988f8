"""Objective: what is learned from an example, as far as memory and speed depend on it."""

from __future__ import annotations

from planner.base.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A loss. `sequences_per_example` go through the model for one example of a batch, and of each the first
    `unlabelled_tokens` have no label.
    """

    name: str
    sequences_per_example: int
    unlabelled_tokens: int


SFT = Objective(name="sft", sequences_per_example=1, unlabelled_tokens=1)
"""Next-token prediction: a sequence an example, whose first token nothing predicts."""
