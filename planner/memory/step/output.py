"""Which output head a step has, of those that are replayed."""

from __future__ import annotations

from planner.memory.held.head import HeadShape
from planner.memory.step.head import HeadReplay
from planner.memory.step.logits import LogitsReplay
from planner.memory.step.score import ScoreReplay

OutputReplay = HeadReplay | LogitsReplay | ScoreReplay


def output_replay(shape: HeadShape) -> OutputReplay:
    """The head of that shape."""
    if shape.scores:
        return ScoreReplay(shape)
    return LogitsReplay(shape) if shape.whole else HeadReplay(shape)
