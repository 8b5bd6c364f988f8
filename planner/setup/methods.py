"""What a method brings with it: the same run with another one, and how a mixture's experts are held.

What QLoRA, 16-bit LoRA and full fine-tuning have in common is kept.
"""

from __future__ import annotations

from planner.models.spec import ModelSpec
from planner.setup.knob import Knob, KnobValue
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup


def with_method(setup: TrainingSetup, method: str) -> TrainingSetup:
    """Change the method; knobs that the new one refuses take their defaults."""
    return setup if setup.method == method else setup.replace(method=method, **refused_by(method))


def refused_by(method: str, knobs: tuple[Knob, ...] = KNOBS) -> dict[str, KnobValue | None]:
    """Knobs of which a method refuses all values but the default, with those."""
    return {knob.name: knob.default for knob in knobs if method not in knob.methods and not knob.kept}


def experts_held(setup: TrainingSetup, model: ModelSpec) -> str:
    """What a setup takes for its knob `experts`: 4 bits wherever the model has experts and other knobs allow
    it, else what the knob is by default.
    """
    held = next(knob for knob in KNOBS if knob.name == "experts")
    allowed = all(getattr(setup, need.other) != need.other_than for need in held.needs)
    has_experts = any(layer.experts for layer in model.layers)
    return "4bit" if has_experts and allowed and setup.method in held.methods else str(held.default)
