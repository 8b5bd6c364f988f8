"""Work of one training step: what the GPU computes and moves, and what the host launches.

Matrix work is counted from the model's parameters (flops.py). Everything else follows from the same replay of
a decoder layer that memory is counted from: each tensor that a layer makes is a kernel launched and bytes
written, forward, recomputed and backward, for every knob that the memory model knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from planner.memory.adapter import trainables
from planner.memory.decoder_layer import replay
from planner.memory.layer_knobs import LayerKnobs
from planner.memory.refusals import attention_implementation
from planner.memory.segments import segments
from planner.memory.shape import micro_step
from planner.memory.tape import Buffer, Tape, Value
from planner.model_spec import LayerSpec, ModelSpec
from planner.throughput.flops import checkpointed_share, linear_work, matrix_flops
from planner.throughput.traffic import OPTIMIZER, trained_parameters
from planner.training_setup import TrainingSetup


class LayerWork(NamedTuple):
    """Tensors that one layer makes in a micro-step: how many, and their bytes as on the tape."""

    launches: int
    constant: float
    per_token: float
    per_score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Work of one micro-step, and of one optimizer step.

    `*_flops`: floating-point operations of the layers' matrices, the adapter's, the output head's and
    attention's (fused kernels; eager attention's are in its tensors); `total_flops` has attention's in any
    case. `single` says that they run in fp32 without tensor cores. `written_bytes` are the tensors that grow
    with the batch, `weight_bytes` those that do not (dequantised weights above all), `launches` how many
    there are. `*_calls` count passes through linear layers that run Python of their own, by how they are
    held and whether their layer is compiled.
    """

    total_flops: float
    layer_flops: float
    adapter_flops: float
    head_flops: float
    attention_flops: float
    single: bool
    written_bytes: float
    weight_bytes: float
    launches: int
    quantized_calls: float
    lora_calls: float
    full_calls: float
    compiled_calls: float
    offloaded_bytes: float
    optimizer_bytes: float
    optimizer_tensors: int


class _CountingTape(Tape):
    """A tape that counts what is made and forgets what lives."""

    def __init__(self, *, saves: bool) -> None:
        super().__init__(saves=saves)
        self.launches = 0
        self.constant = self.per_token = self.per_score = 0.0

    def tokens(self, per_token: float, category: int = 0) -> Buffer:
        self.launches += 1
        self.per_token += per_token
        return Buffer(0.0, per_token, 0.0, 0)

    def _take(self, constant: float, per_token: float, per_score: float, slot: int) -> Buffer:
        self.launches += 1
        self.constant += constant
        self.per_token += per_token
        self.per_score += per_score
        return Buffer(constant, per_token, per_score, 0)

    def free(self, *buffers: Buffer | None) -> None:
        for buffer in buffers:
            if buffer is not None:
                buffer.holders -= 1

    def save(self, buffer: Buffer) -> Buffer | None:
        if not self.saves:
            return None
        buffer.holders += 1
        return buffer


@lru_cache(maxsize=8192)
def layer_work(
    layer: LayerSpec, knobs: LayerKnobs, *, checkpointed: bool, input_requires_grad: bool
) -> LayerWork:
    """Work of one decoder layer in one micro-step; a checkpointed one runs forward twice."""
    passes = []
    if checkpointed:
        first = _CountingTape(saves=False)
        replay(first, layer, knobs, Value(first.tokens(0), False))
        passes.append(first)
    tape = _CountingTape(saves=True)
    hidden = Value(tape.tokens(0), input_requires_grad or checkpointed)
    output = replay(tape, layer, knobs, hidden)
    output.grad = tape.tokens(layer.hidden_size * output.width)
    tape.backward()
    passes.append(tape)
    return LayerWork(
        sum(one.launches for one in passes),
        sum(one.constant for one in passes),
        sum(one.per_token for one in passes),
        sum(one.per_score for one in passes),
    )


def step_work(setup: TrainingSetup, model: ModelSpec, *, padded: bool = False) -> StepWork:
    """Count the work of a setup's steps, sequences full."""
    attention = attention_implementation(setup, model)
    parts, _ = segments(setup, model, trainables(setup, model), attention=attention, padded=padded)
    shape = micro_step(setup)
    launches, written, constant = 0, 0.0, 0.0
    for part in parts:
        one = layer_work(
            part.layer,
            part.knobs,
            checkpointed=part.checkpointed,
            input_requires_grad=part.input_requires_grad,
        )
        count = len(part.indices)
        launches += count * one.launches
        constant += count * one.constant
        written += count * (one.per_token * shape.tokens + one.per_score * shape.scores)
    flops = matrix_flops(setup, model)
    linear = linear_work(model, setup.target_modules)
    passes = 2 + checkpointed_share(setup, model)
    compiled = setup.compile != "none"
    wrapped = linear.wrapped_count * passes
    offloaded = model.num_hidden_layers * shape.tokens * model.hidden_size * shape.stream_bytes
    return StepWork(
        total_flops=flops.total,
        layer_flops=flops.layers,
        adapter_flops=flops.adapter,
        head_flops=flops.head,
        attention_flops=0.0 if attention == "eager" else flops.attention,
        single=setup.dtype == "float32",
        written_bytes=written,
        weight_bytes=constant,
        launches=launches,
        quantized_calls=wrapped if setup.method == "qlora" and not compiled else 0.0,
        lora_calls=wrapped if setup.method == "lora" and not compiled else 0.0,
        full_calls=linear.linear_count * passes if setup.method == "full" and not compiled else 0.0,
        compiled_calls=linear.linear_count * passes if compiled else 0.0,
        offloaded_bytes=2.0 * offloaded if setup.activation_offloading else 0.0,
        optimizer_bytes=trained_parameters(setup, linear) * OPTIMIZER[setup.optim],
        optimizer_tensors=2 * linear.wrapped_count if setup.uses_lora else linear.all_tensors,
    )
