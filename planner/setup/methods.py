"""What a method brings with it: the same run with another one, and how a mixture's experts are held.

What QLoRA, 16-bit LoRA and full fine-tuning have in common is kept.
"""

from __future__ import annotations

from collections.abc import Container

from planner.models.checkpoint import Checkpoint
from planner.models.spec import ModelSpec
from planner.setup.knob import Knob, KnobValue
from planner.setup.knobs import KNOBS
from planner.setup.request import PlanRequest
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
    allowed = not setup.load_in_8bit and all(
        getattr(setup, need.other) != need.other_than for need in held.needs
    )
    # A checkpoint that is quantised already was made by bitsandbytes, which leaves experts in 16 bits.
    has_experts = model.checkpoint is None and any(layer.experts for layer in model.layers)
    return "4bit" if has_experts and allowed and setup.method in held.methods else str(held.default)


def as_stored(setup: TrainingSetup, model: ModelSpec, fixed: Container[str] = ()) -> TrainingSetup:
    """A setup with what the model's checkpoint decides, where its weights are quantised already: knobs at
    their defaults take its values, unless they are among the `fixed`.
    """
    if model.checkpoint is None or setup.method != "qlora":
        return setup
    taken = {
        name: value
        for name, value in stored_knobs(model.checkpoint).items()
        if name not in fixed and getattr(setup, name) == _DEFAULTS[name]
    }
    return setup.replace(**taken)


def as_stored_request(request: PlanRequest, model: ModelSpec) -> PlanRequest:
    """The same request with what the checkpoint decides fixed, where a plan would take something else."""
    if model.checkpoint is None:
        return request
    decided = stored_knobs(model.checkpoint)
    missing = {name: value for name, value in decided.items() if value != _DEFAULTS[name]}
    return request.with_knobs({**missing, **request.fixed})


def stored_knobs(checkpoint: Checkpoint) -> dict[str, KnobValue]:
    """Knobs that a quantised checkpoint decides, at its values."""
    if checkpoint.quant_type is None:
        return {"load_in_8bit": True}
    return {
        "load_in_8bit": False,
        "bnb_4bit_quant_type": checkpoint.quant_type,
        "bnb_4bit_use_double_quant": checkpoint.double_quant,
    }


_DEFAULTS = {knob.name: knob.default for knob in KNOBS}
