"""Work of one training step: what the GPU computes and moves, and what the host launches.

Matrix work is counted from the model's parameters (flops.py). Everything else follows from the same replay of
a decoder layer that memory is counted from: each tensor that a layer makes is a kernel launched and bytes
written, forward, recomputed and backward, for every knob that the memory model knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from planner.memory.decoder.groups import DecoderSetup, decoder_setup, groups_of
from planner.memory.decoder.layer import run_layer
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.tape.tape import Buffer, Tape, Value
from planner.models.spec import LayerSpec, ModelSpec
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.flops import checkpointed_share, linear_work, pass_flops
from planner.throughput.traffic import OPTIMIZER, OPTIMIZER_CALLS, trained_parameters


class Made(NamedTuple):
    """Tensors made: how many, and their bytes as on the tape."""

    launches: int
    constant: float
    per_token: float
    per_score: float

    def plus(self, other: Made, count: int) -> Made:
        """These and so many times the others."""
        return Made(
            self.launches + count * other.launches,
            self.constant + count * other.constant,
            self.per_token + count * other.per_token,
            self.per_score + count * other.per_score,
        )

    def bytes_at(self, tokens: int, scores: int) -> float:
        """Bytes in a micro-step of that many tokens and score elements."""
        return self.constant + tokens * self.per_token + scores * self.per_score


NOTHING = Made(0, 0.0, 0.0, 0.0)


class LayerWork(NamedTuple):
    """Tensors that one layer makes in a micro-step: forward, recomputed in the backward pass, backward; and
    those that it keeps from forward to backward.
    """

    forward: Made
    recomputed: Made
    backward: Made
    kept: Made


class PassWork(NamedTuple):
    """Work of a micro-step's forward pass, or of its backward pass with what it recomputes.

    `*_flops`: floating-point operations of the layers' matrices, the adapter's, the output head's and
    attention's (fused kernels, apart where they take a mask, and there with wide heads; eager attention's are
    in its tensors). `written_bytes` are the tensors that grow with the batch, `weight_bytes` those that do
    not (dequantised weights above all). Of eager layers, `launches` counts tensors made, `quantized_calls`
    and `lora_calls` runs of PEFT's Python around a 4-bit or 16-bit layer, `liger_calls` runs of Liger's,
    `selected_launches` tensors made where selective checkpointing looks at each operation. Compiled are
    `compiled_layers`, and `compiled_calls` of the 4-bit layers in them, whose kernels no compiler sees into.
    """

    layer_flops: float
    adapter_flops: float
    head_flops: float
    attention_flops: float
    masked_attention_flops: float
    wide_masked_attention_flops: float
    written_bytes: float
    weight_bytes: float
    launches: float
    quantized_calls: float
    lora_calls: float
    liger_calls: float
    selected_launches: float
    eager_layers: float
    compiled_layers: float
    compiled_calls: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Work of one micro-step, and of one optimizer step.

    `total_flops` has eager attention's too. `single` says that matrices are in fp32.
    `offloaded_bytes` leave for the host in the forward pass and come back in the backward pass.
    """

    total_flops: float
    single: bool
    forward: PassWork
    backward: PassWork
    offloaded_bytes: float
    optimizer_bytes: float
    optimizer_calls: float


class _CountingTape(Tape):
    """A tape that counts what is made and forgets what lives."""

    def __init__(self, *, saves: bool) -> None:
        super().__init__(saves=saves)
        self.launches = self.saved = 0
        self.constant = self.per_token = self.per_score = 0.0
        self.saved_per_token = self.saved_per_score = 0.0

    def made(self) -> Made:
        """What was made so far."""
        return Made(self.launches, self.constant, self.per_token, self.per_score)

    def kept(self) -> Made:
        """What backward nodes hold of it, parameters and their copies left out, each once."""
        return Made(self.saved, 0.0, self.saved_per_token, self.saved_per_score)

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
        if not buffer.saves:
            self.saved += 1
            self.saved_per_token += buffer.per_token
            self.saved_per_score += buffer.per_score
        buffer.saves += 1
        buffer.holders += 1
        return buffer


@lru_cache(maxsize=8192)
def layer_work(
    layer: LayerSpec, knobs: LayerKnobs, *, checkpointed: bool, input_requires_grad: bool
) -> LayerWork:
    """Work of one decoder layer in one micro-step; a checkpointed one runs forward twice."""
    first = NOTHING
    if checkpointed:
        alone = _CountingTape(saves=False)
        run_layer(alone, layer, knobs, Value(alone.tokens(0), False))
        first = alone.made()
    tape = _CountingTape(saves=True)
    hidden = Value(tape.tokens(0), input_requires_grad or checkpointed)
    output = run_layer(tape, layer, knobs, hidden)
    forward, kept = tape.made(), tape.kept()
    output.grad = tape.tokens(layer.hidden_size * output.width)
    tape.backward()
    backward = tape.made().plus(forward, -1)
    if checkpointed:
        return LayerWork(first, forward, backward, kept)
    return LayerWork(forward, NOTHING, backward, kept)


def step_work(run: TrainingRun) -> StepWork:
    """Count the work of a run's steps, sequences full."""
    setup, model = run.setup, run.model
    shape = run.micro_step
    made = _all_layers(model, decoder_setup(run))
    flops = pass_flops(run)
    share = checkpointed_share(run)
    linear = linear_work(model, setup.target_modules)
    python = _python_runs(setup, model, linear.wrapped_count, made.liger_kernels)
    passes = tuple(
        PassWork(
            layer_flops=part.layers,
            adapter_flops=part.adapter,
            head_flops=part.head,
            attention_flops=0.0 if run.attention == "eager" else part.attention,
            masked_attention_flops=part.masked_attention,
            wide_masked_attention_flops=part.wide_masked_attention,
            written_bytes=tensors.bytes_at(shape.tokens, shape.scores) - tensors.constant,
            weight_bytes=tensors.constant,
            launches=0 if setup.compile != "none" else tensors.launches,
            selected_launches=dispatched.launches if setup.selective_checkpointing else 0,
            quantized_calls=python.quantized * runs,
            lora_calls=python.lora * runs,
            liger_calls=python.liger * nodes,
            eager_layers=python.eager_layers * runs,
            compiled_layers=python.compiled_layers,
            compiled_calls=python.compiled * nodes,
        )
        for part, tensors, dispatched, runs, nodes in (
            (flops[0], made.forward, made.forward, 1.0, 1.0),
            # Backward nodes of bitsandbytes and Liger are Python too, of PEFT's layers torch's own.
            (flops[1], made.backward, made.recomputed, share, 1.0 + share),
        )
    )
    trained = 2 * linear.wrapped_count if setup.uses_lora else linear.all_tensors
    return StepWork(
        total_flops=sum(part.total for part in flops),
        single=setup.dtype == "float32",
        forward=passes[0],
        backward=passes[1],
        offloaded_bytes=made.kept.bytes_at(shape.tokens, shape.scores)
        if setup.activation_offloading
        else 0.0,
        optimizer_bytes=trained_parameters(setup, linear) * OPTIMIZER[setup.optim],
        optimizer_calls=trained * OPTIMIZER_CALLS.get(setup.optim, 1.0),
    )


class _AllLayers(NamedTuple):
    """What all decoder layers make (in the backward pass with what it recomputes) and keep together."""

    forward: Made
    recomputed: Made
    backward: Made
    kept: Made
    liger_kernels: int


@lru_cache(maxsize=4096)
def _all_layers(model: ModelSpec, decoder: DecoderSetup) -> _AllLayers:
    """Sum up a model's layers."""
    forward = recomputed = backward = kept = NOTHING
    liger = 0
    for part in groups_of(model, decoder)[0]:
        count = len(part.indices)
        one = layer_work(
            part.layer,
            part.knobs,
            checkpointed=part.checkpointed,
            input_requires_grad=part.input_requires_grad,
        )
        inputs = Made(1, 0.0, part.input_bytes_per_token, 0.0)
        forward = forward.plus(one.forward, count)
        recomputed = recomputed.plus(one.recomputed, count)
        backward = backward.plus(one.backward, count).plus(one.recomputed, count)
        # A compiled layer is offloaded only where its input is all that it keeps (memory/refusals.py).
        alone = part.checkpointed or part.knobs.compiled
        kept = kept.plus(inputs if alone else one.kept, count)
        liger += count * _liger_kernels(part.layer)
    return _AllLayers(forward, recomputed, backward, kept, liger)


class _PythonRuns(NamedTuple):
    """Layers whose Python runs once a pass, by kind."""

    quantized: int
    lora: int
    liger: int
    compiled: int
    compiled_layers: int
    eager_layers: int


def _python_runs(setup: TrainingSetup, model: ModelSpec, wrapped: int, liger: int) -> _PythonRuns:
    if setup.compile != "none":
        quantized = wrapped if setup.method == "qlora" else 0
        return _PythonRuns(0, 0, 0, quantized, model.num_hidden_layers, 0)
    return _PythonRuns(
        wrapped if setup.method == "qlora" else 0,
        wrapped if setup.method == "lora" else 0,
        liger if setup.kernels == "liger" else 0,
        0,
        0,
        model.num_hidden_layers,
    )


def _liger_kernels(layer: LayerSpec) -> int:
    """Kernels of Liger's in a layer's forward: norms, activation, rotation."""
    norms = 2 * layer.input_norms + 2 * layer.output_norms + 2 * (layer.qk_norm != "none")
    return norms + layer.gated_mlp + layer.rotary
