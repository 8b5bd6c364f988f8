"""The same run with another method: what QLoRA, 16-bit LoRA and full fine-tuning have in common is kept."""

from __future__ import annotations

from planner.setup.knob import Knob, KnobValue
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup


def with_method(setup: TrainingSetup, method: str) -> TrainingSetup:
    """Change the method; knobs that the new one refuses take their defaults."""
    return setup if setup.method == method else setup.replace(method=method, **refused_by(method))


def refused_by(method: str, knobs: tuple[Knob, ...] = KNOBS) -> dict[str, KnobValue | None]:
    """Knobs of which a method refuses all values but the default, with those."""
    return {knob.name: knob.default for knob in knobs if method not in knob.methods and not knob.kept}
