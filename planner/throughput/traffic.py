"""Bytes that one training step moves through the GPU's memory outside its matmuls.

Each constant is the sum of reads and writes of the kernels that the eager code launches, 16-bit activations,
fp32 where that code computes in fp32; tensors read or written by a matmul itself are not counted (its rate
as measured includes them).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.model_spec import LayerSpec, ModelSpec
from planner.throughput.flops import (
    LinearWork,
    attention_implementation,
    attention_pairs,
    checkpointed_share,
    linear_work,
)
from planner.training_setup import TrainingSetup


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Bytes per element of an operation's forward and of its backward."""

    forward: float
    backward: float


# LlamaRMSNorm: cast up, square, mean, scale, cast down, times weight (transformers modeling_llama.py).
EAGER_NORM = PassBytes(36, 56)
FUSED_NORM = PassBytes(4, 6)
# apply_rotary_pos_emb on queries and keys: two products, a negated and concatenated half, a sum.
EAGER_ROTARY = PassBytes(20, 24)
FUSED_ROTARY = PassBytes(4, 4)
# act(gate) * up.
EAGER_GATE = PassBytes(10, 18)
FUSED_GATE = PassBytes(6, 10)
RESIDUAL = PassBytes(6, 6)
# softmax(QK^T) kept in fp32 and cast back, per pair and head.
EAGER_SCORES = PassBytes(24, 36)
# peft/tuners/lora/bnb.py:533 clones the base output; then scaling and sum. Inputs: the two gradients' sum.
QLORA_OUTPUT = PassBytes(16, 8)
QLORA_INPUT = PassBytes(2, 10)
# peft/tuners/lora/layer.py:1100 casts the input to the adapter's fp32; products, scaling and sum run in fp32.
LORA_OUTPUT = PassBytes(28, 22)
LORA_INPUT = PassBytes(10, 20)
DROPOUT_INPUT = PassBytes(5, 5)
# A compiled layer fuses the clone, scaling and sum of an adapter into the neighbouring kernels.
COMPILED_ADAPTER = 0.5
# bitsandbytes: 0.516 B read, absmax written and read in fp32, 2 B written (backends/cuda/ops.py:904-916).
DEQUANTISE = 2.7
# DoRA's norm: the dequantised weight, BA, their sum and its norm (peft/tuners/lora/dora.py:86-98).
DORA_NORM = 16.0
# fp32 weights under autocast: read 4, write 2.
AUTOCAST_WEIGHT = 6.0
# A tile of logits written, reduced, and in the backward turned into its gradient
# (trl/kernels/chunked_logprob.py).
HEAD_LOGIT = PassBytes(12, 16)

# Per trained parameter and optimizer step: gradient norm and clipping (6), gradient, weight, state read and
# written, for 16-bit weights (state sizes: section "optimizer" of the memory model).
OPTIMIZER = {
    "adamw_torch": 24.0,
    "adamw_torch_fused": 16.0,
    "adamw_8bit": 16.0,
    "paged_adamw_8bit": 16.0,
    "paged_adamw_32bit": 28.0,
    "adafactor": 30.0,
    "lion_8bit": 14.0,
    "paged_lion_8bit": 14.0,
    "sgd": 12.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes of one micro-step (`activations`, `weights`) and of one optimizer step."""

    activations: float
    weights: float
    optimizer: float


def traffic(setup: TrainingSetup, model: ModelSpec) -> Traffic:
    """Count what a step reads and writes outside its matmuls."""
    work = linear_work(model, setup.target_modules)
    recomputed = checkpointed_share(setup, model)
    tokens = setup.tokens_per_micro_step
    stream = 2.0 if setup.dtype == "float32" else 1.0
    activations = stream * tokens * sum(_layer_bytes(setup, layer, recomputed) for layer in model.layers)
    activations += tokens * _adapter_bytes(setup, work, recomputed)
    activations += tokens * model.vocab_size * (HEAD_LOGIT.forward + HEAD_LOGIT.backward)
    activations += _score_bytes(setup, model, recomputed)
    return Traffic(
        activations=activations,
        weights=_weight_bytes(setup, work, recomputed),
        optimizer=trained_parameters(setup, work) * OPTIMIZER[setup.optim],
    )


def trained_parameters(setup: TrainingSetup, work: LinearWork) -> int:
    """Elements that the optimizer updates."""
    if not setup.uses_lora:
        return work.all_parameters
    adapter = setup.lora_r * (work.wrapped_inputs + work.wrapped_outputs)
    return adapter + work.wrapped_outputs if setup.use_dora else adapter


def _both(cost: PassBytes, recomputed: float) -> float:
    return cost.forward * (1 + recomputed) + cost.backward


def _layer_bytes(setup: TrainingSetup, layer: LayerSpec, recomputed: float) -> float:
    """Bytes a token of all layers of one kind, adapters apart."""
    fused = setup.kernels == "liger" or setup.compile != "none"
    norm, rotary, gate = (
        (FUSED_NORM, FUSED_ROTARY, FUSED_GATE) if fused else (EAGER_NORM, EAGER_ROTARY, EAGER_GATE)
    )
    normed = layer.hidden_size * 2 * (layer.input_norms + layer.output_norms)
    if layer.qk_norm != "none":
        normed += layer.query_size + layer.key_value_size
    gated = layer.intermediate_size
    if layer.experts:
        gated = layer.experts_per_token * layer.expert_intermediate_size
        gated += layer.shared_expert_intermediate_size
    a_layer = normed * _both(norm, recomputed) + gated * _both(gate, recomputed)
    a_layer += 2 * layer.hidden_size * _both(RESIDUAL, recomputed)
    if layer.rotary:
        a_layer += (layer.query_size + layer.key_value_size) * _both(rotary, recomputed)
    return a_layer * layer.count


def _adapter_bytes(setup: TrainingSetup, work: LinearWork, recomputed: float) -> float:
    if not setup.uses_lora:
        return 0.0
    output, input_ = (QLORA_OUTPUT, QLORA_INPUT) if setup.method == "qlora" else (LORA_OUTPUT, LORA_INPUT)
    total = work.wrapped_outputs * _both(output, recomputed) + work.wrapped_inputs * _both(input_, recomputed)
    if setup.compile != "none":
        total *= COMPILED_ADAPTER
    if setup.lora_dropout > 0:
        total += work.wrapped_inputs * _both(DROPOUT_INPUT, recomputed)
    return total


def _score_bytes(setup: TrainingSetup, model: ModelSpec, recomputed: float) -> float:
    if attention_implementation(setup, model) != "eager":
        return 0.0
    again = 0.0 if setup.selective_checkpointing else recomputed
    return sum(
        layer.count
        * layer.num_attention_heads
        * attention_pairs(setup, layer, "eager")
        * _both(EAGER_SCORES, again)
        for layer in model.layers
    )


def _weight_bytes(setup: TrainingSetup, work: LinearWork, recomputed: float) -> float:
    forwards = 1 + recomputed
    total = 0.0
    if setup.method == "qlora":
        wide = 2.2 if setup.dtype == "float32" else 1.0
        total += work.linear_weights * DEQUANTISE * wide * (forwards + 1)
    elif setup.dtype == "float32":
        total += work.active_weights * AUTOCAST_WEIGHT * forwards
    if setup.use_dora:
        total += work.wrapped_weights * DORA_NORM * forwards
    if not setup.uses_lora and setup.gradient_accumulation_steps > 1:
        total += work.all_parameters * 6.0
    return total
