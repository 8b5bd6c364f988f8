"""Parts of a training setup, measured and predicted one by one, so that a change upstream is told by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch

from planner.memory.decoder import layer as decoder_layer
from planner.memory.decoder.groups import LayerGroup, layer_groups
from planner.memory.decoder.live_bytes import at
from planner.memory.held.weights import loaded_weights, upcast_bytes
from planner.memory.layers import attention as attention_replay
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.layers.linear import linear
from planner.memory.layers.norms import norm
from planner.memory.tape.tape import Tape, Value
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.micro_step import micro_step
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

from .live_bytes import LiveBytes, tensors_of
from .real_steps import RealStep
from .small_models import FAMILIES, HIDDEN, spec_of

PREPARATION = "k-bit preparation"
ADAPTER_WEIGHTS = "adapter weights"
BASE_LAYER = "base layer"
ADAPTER = "adapter"
NORM = "norm"
ATTENTION = "attention"
MLP = "mlp"
CHECKPOINT = "checkpoint"
PARTS = (PREPARATION, ADAPTER_WEIGHTS, BASE_LAYER, ADAPTER, NORM, ATTENTION, MLP, CHECKPOINT)
"""From the innermost on: the first that moved is the one that was changed, those after it contain it."""
TOLERANCE = 0.0025
"""Beside an adapter's tensors of a few bytes a token, and DoRA's of a value an output."""


def moved(found: dict[str, int], expected: dict[str, int]) -> str | None:
    """The part that keeps other bytes than expected; null where all are as they should be."""
    for name in PARTS:
        if name in expected and abs(found[name] - expected[name]) > TOLERANCE * max(expected[name], 1):
            return name
    return None


def found_parts(step: RealStep) -> dict[str, int]:
    """Bytes of a real step's weights outside the quantised layers, of its adapter, and what the second
    decoder layer and its modules leave: their output, and what they keep for backward.
    """
    layer = step.stack.layers[1]
    gate = layer.mlp.gate_proj
    parameters = list(step.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    rest = [p for p in parameters if not p.requires_grad and not isinstance(p, bnb.nn.Params4bit)]
    tables = _tables(step)
    attention = {"position_embeddings": tables, "attention_mask": None}
    found = {
        PREPARATION: sum(p.nbytes for p in rest),
        ADAPTER_WEIGHTS: sum(p.nbytes for p in trained),
        BASE_LAYER: _kept(step, getattr(gate, "base_layer", gate), {}),
        NORM: _kept(step, layer.post_attention_layernorm, {}),
        ATTENTION: _kept(step, layer.self_attn, attention),
        MLP: _kept(step, layer.mlp, {}),
    }
    if step.setup.uses_lora:
        found[ADAPTER] = _kept(step, gate, {})
    if step.setup.gradient_checkpointing:
        found[CHECKPOINT] = _kept(step, layer, attention)
    return found


def expected_parts(family: str, setup: TrainingSetup) -> dict[str, int]:
    """What the memory model says of the same parts."""
    model = spec_of(family)
    spec = model.layers[0]
    trained = TrainingRun(setup=setup, model=model).trained
    group = _second_layer(setup, family)
    knobs = group.knobs
    kind = knobs.kind("gate_proj")
    plain = replace(kind, rank=0, dora=False)
    inner = spec.intermediate_size
    replays: dict[str, Callable[[Tape, Value], Value]] = {
        BASE_LAYER: lambda t, x: linear(t, plain, x, HIDDEN, inner),
        ADAPTER: lambda t, x: linear(t, kind, x, HIDDEN, inner),
        NORM: lambda t, x: norm(t, spec, knobs, x, HIDDEN),
        ATTENTION: lambda t, x: attention_replay.attention(t, spec, knobs, x),
        MLP: lambda t, x: decoder_layer._mlp(t, spec, knobs, x),
    }
    if not setup.uses_lora:
        del replays[ADAPTER]
    expected = {name: _kept_by_model(setup, knobs, part) for name, part in replays.items()}
    run = TrainingRun(setup=setup, model=model)
    weights = loaded_weights(model, run.storage, EXPANDABLE).memory
    frozen = weights.unquantized_bytes + upcast_bytes(run.kind)
    expected[PREPARATION] = frozen if setup.uses_lora else 0
    expected[ADAPTER_WEIGHTS] = trained.size_bytes
    if group.checkpointed:
        tokens = micro_step(setup).tokens
        kept = group.input_bytes_per_token + group.selected_bytes_per_token
        expected[CHECKPOINT] = tokens * (kept + HIDDEN * group.memory.output_width)
    return expected


def _second_layer(setup: TrainingSetup, family: str) -> LayerGroup:
    model = spec_of(family)
    parts, _ = layer_groups(TrainingRun(setup=setup, model=model, padded=False))
    return next(part for part in parts if 1 in part.indices)


def _kept_by_model(setup: TrainingSetup, knobs: LayerKnobs, part: Callable[[Tape, Value], Value]) -> int:
    shape = micro_step(setup)
    tape = Tape(saves=True)
    x = Value(tape.tokens(HIDDEN * knobs.stream_width), True, knobs.stream_width)
    part(tape, x)
    tape.free(x.buffer)
    return int(at(tape.live, shape.tokens, shape.scores))


def _kept(step: RealStep, module: Any, inputs: dict[str, Any]) -> int:
    """Bytes that a module leaves: its output, and what it keeps for backward, be it its input."""
    setup = step.setup
    width = _second_layer(setup, setup.model).knobs.stream_width
    dtype = torch.float32 if width == 4 else torch.bfloat16
    leaf = torch.randn(setup.per_device_train_batch_size, setup.max_length, HIDDEN).to(dtype).requires_grad_()
    tables = inputs.get("position_embeddings", ())
    with LiveBytes([*tensors_of(module), leaf, *tables], values=False) as live:
        with step.autocast():
            x = leaf.clone()
            output = module(x, **inputs)
            output = output[0] if isinstance(output, tuple) else output
            del x
        # Autocast's copies of weights that nothing has saved are gone by now.
        kept: int = live.live_bytes
    del output
    return kept


def _tables(step: RealStep) -> tuple[torch.Tensor, torch.Tensor]:
    config = FAMILIES[step.setup.model]
    size = config.get("head_dim", HIDDEN // config["num_attention_heads"])
    dtype = torch.float32 if step.setup.prepare_for_kbit_training else torch.bfloat16
    if step.setup.dtype == "float32":
        dtype = torch.float32
    cosine, sine = torch.randn(2, 1, step.setup.max_length, size).to(dtype)
    return cosine, sine
