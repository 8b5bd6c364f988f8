"""Matrix work of one training micro-step, counted from the model's own parameters.

Every count is exact for dense models; a mixture of experts counts the experts that a token is routed to.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import NamedTuple

from planner.models.spec import LayerSpec, ModelSpec, Parameter
from planner.setup.attention import SKIPS_MASKED
from planner.setup.run import TrainingRun
from planner.setup.training_setup import ALL_LINEAR

# Attention's backward with flash or memory-efficient kernels: five matmuls (the scores again, dV, dP, dQ, dK)
# against the forward's two (Dao 2023, arXiv:2307.08691, section 4.1).
ATTENTION_BACKWARD = 2.5
# Eager attention keeps the scores: four matmuls against two.
EAGER_ATTENTION_BACKWARD = 2.0
WIDE_HEAD = 128
"""Head width up to which torch's memory-efficient kernels, which take masks, hold their output in registers
(aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h: kKeepOutputInRF). Wider ones, as
Gemma 3's of 256, write and read it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearWork:
    """Sums over a model's decoder layers that fix its matrix work, for one choice of LoRA targets.

    `active_weights` are weight elements that multiply each token; `linear_weights` those in nn.Linear, which
    QLoRA holds in 4 bits; `wrapped_*` are sums over the layers that an adapter wraps: input and output
    widths, weight elements, and how many there are. `trainable_tensors` counts all parameter tensors.
    """

    active_weights: int
    linear_weights: int
    linear_count: int
    wrapped_inputs: int
    wrapped_outputs: int
    wrapped_weights: int
    wrapped_count: int
    head_weights: int
    all_parameters: int
    all_tensors: int


class MatrixFlops(NamedTuple):
    """Floating-point operations of one micro-step's matmuls, multiply and add counted apart.

    `masked_attention` is that of layers whose attention is given a mask, which flash kernels do not take;
    `wide_masked_attention` that of those among them whose heads are wider than WIDE_HEAD.
    """

    layers: float
    adapter: float
    head: float
    attention: float
    masked_attention: float
    wide_masked_attention: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def matrix_flops(run: TrainingRun) -> MatrixFlops:
    """Count the matmuls of one micro-step: forward, recompute of checkpointed layers, backward."""
    forward, backward = pass_flops(run)
    return MatrixFlops(*map(operator.add, forward, backward))


def pass_flops(run: TrainingRun) -> tuple[MatrixFlops, MatrixFlops]:
    """Count the matmuls of a micro-step's forward pass, and of its backward pass with what it recomputes.

    A weight that is trained has three matmuls a token (forward, input gradient, weight gradient), a frozen
    one has no weight gradient; each costs 2 operations an element. TRL's chunked head computes each tile of
    logits in the forward and again in the backward, then the hidden states' gradient
    (trl/kernels/chunked_logprob.py:347), and with a trained head its weight gradient.
    """
    setup, tokens = run.setup, run.micro_step.tokens
    work = linear_work(run.model, setup.target_modules)
    recomputed = checkpointed_share(run)
    trained = not setup.uses_lora
    adapter = norm = 0.0
    if setup.uses_lora:
        adapter = 2.0 * setup.lora_r * (work.wrapped_inputs + work.wrapped_outputs) * tokens
        if setup.use_dora:
            # The norm of W + BA needs BA itself, in each forward (peft/tuners/lora/dora.py:86-98).
            norm = 2.0 * setup.lora_r * work.wrapped_weights
    layers = 2.0 * work.active_weights * tokens
    head = 2.0 * work.head_weights * tokens
    attention, masked, wide = _attention_flops(run)
    again = _attention_again(run, recomputed)
    return (
        MatrixFlops(
            layers=layers,
            adapter=adapter + norm,
            head=head,
            attention=attention,
            masked_attention=masked,
            wide_masked_attention=wide,
        ),
        MatrixFlops(
            layers=layers * (1 + recomputed + trained),
            adapter=adapter * (2 + recomputed) + norm * recomputed,
            head=head * (2 + trained),
            attention=attention * again,
            masked_attention=masked * again,
            wide_masked_attention=wide * again,
        ),
    )


def checkpointed_share(run: TrainingRun) -> float:
    """Share of the decoder layers' forward that runs again in the backward.

    An activation memory budget recomputes about as much of a compiled layer as it does not let it keep.
    """
    if run.setup.activation_memory_budget is not None:
        return 1.0 - run.setup.activation_memory_budget
    layers = run.model.num_hidden_layers
    return min(run.checkpointed_layers, layers) / layers


def attention_pairs(run: TrainingRun, layer: LayerSpec, kernel: str) -> float:
    """Query-key pairs that one head computes in a micro-step.

    Flash and flex attention skip what is masked. SDPA does so only without a mask tensor. Eager computes
    every pair. A packed batch is one long row.
    """
    setup = run.setup
    length, batch = setup.max_length, setup.per_device_train_batch_size
    window = layer.sliding_window
    if run.attention in SKIPS_MASKED:
        if window is None or window >= length:
            return batch * length * (length + 1) / 2
        return batch * (window * (window + 1) / 2 + (length - window) * window)
    if setup.packing:
        return float((batch * length) ** 2)
    if run.attention == "eager" or kernel == "masked":
        return float(batch * length * length)
    return batch * length * (length + 1) / 2


def _attention_flops(run: TrainingRun) -> tuple[float, float, float]:
    """Attention's share of the forward pass: of layers without a mask, of those with one, and of the latter
    those with wide heads apart.
    """
    found = [0.0, 0.0, 0.0]
    for layer, kernel in zip(run.model.layers, run.attention_kernels, strict=True):
        pairs = attention_pairs(run, layer, kernel)
        # QK^T and PV: 2 operations an element of the head each.
        kind = 0 if kernel != "masked" else 1 if layer.head_dim <= WIDE_HEAD else 2
        found[kind] += 4.0 * layer.count * layer.query_size * pairs
    return found[0], found[1], found[2]


def _attention_again(run: TrainingRun, recomputed: float) -> float:
    """Attention's operations in the backward pass, recomputed ones too, for each of the forward pass."""
    again = 0.0 if run.keeps_attention else recomputed
    return again + (EAGER_ATTENTION_BACKWARD if run.attention == "eager" else ATTENTION_BACKWARD)


@functools.lru_cache(maxsize=256)
def linear_work(model: ModelSpec, target_modules: str | tuple[str, ...]) -> LinearWork:
    """Sum up the model's matrix weights for one choice of LoRA targets."""
    active = 0.0
    linear = [0, 0]
    wrapped = [0, 0, 0, 0]
    for parameter in model.parameters:
        if not parameter.in_decoder_layer or len(parameter.shape) < 2:
            continue
        elements = parameter.elements * parameter.count
        active += elements * _routed_share(parameter, model)
        if parameter.module_class != "Linear":
            continue
        linear[0] += elements
        linear[1] += parameter.count
        if _is_target(parameter, target_modules):
            outputs, inputs = parameter.shape
            wrapped[0] += inputs * parameter.count
            wrapped[1] += outputs * parameter.count
            wrapped[2] += elements
            wrapped[3] += parameter.count
    return LinearWork(
        active_weights=round(active),
        linear_weights=linear[0],
        linear_count=linear[1],
        wrapped_inputs=wrapped[0],
        wrapped_outputs=wrapped[1],
        wrapped_weights=wrapped[2],
        wrapped_count=wrapped[3],
        head_weights=model.vocab_size * model.hidden_size,
        all_parameters=model.parameter_count,
        all_tensors=sum(p.count for p in model.parameters if not p.tied),
    )


def _routed_share(parameter: Parameter, model: ModelSpec) -> float:
    """Share of an expert tensor that multiplies one token; 1 for all other weights."""
    if len(parameter.shape) < 3 and ".experts." not in parameter.name:
        return 1.0
    for layer in model.layers:
        if layer.experts:
            return layer.experts_per_token / layer.experts
    return 1.0


def _is_target(parameter: Parameter, target_modules: str | tuple[str, ...]) -> bool:
    if target_modules == ALL_LINEAR:
        return True
    module = parameter.name.rsplit(".", 1)[0]
    return any(module == target or module.endswith(f".{target}") for target in target_modules)
