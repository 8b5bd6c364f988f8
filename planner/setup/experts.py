"""How a mixture's experts are held where nobody has said."""

from __future__ import annotations

from planner.models.spec import ModelSpec
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup


def experts_held(setup: TrainingSetup, model: ModelSpec) -> str:
    """What a setup takes for its knob `experts`: 4 bits wherever the model has experts and other knobs allow
    it, else what the knob is by default.
    """
    held = next(knob for knob in KNOBS if knob.name == "experts")
    allowed = all(getattr(setup, need.other) != need.other_than for need in held.needs)
    has_experts = any(layer.experts for layer in model.layers)
    return "4bit" if has_experts and allowed and setup.method in held.methods else str(held.default)
