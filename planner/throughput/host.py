"""Time the host needs to launch a training step's kernels: no GPU, however fast, finishes the step before."""

from __future__ import annotations

from planner.model_spec import LayerSpec, ModelSpec
from planner.throughput.flops import LinearWork, checkpointed_share, linear_work
from planner.training_setup import TrainingSetup

# Seconds of host time, fitted by eye to two points on an H100's host: Llama-3.1-8B shapes, QLoRA r16 on all
# linear layers, one sequence of 2,048 tokens with TRL 1.16 takes 0.498 s (as long as two of them, so the GPU
# waits), and 0.281 s with each decoder layer compiled and no checkpointing. How they divide between the three
# constants is a guess; hosts differ by a factor of two.
SECONDS_PER_OPERATION = 20e-6
SECONDS_PER_WRAPPED_LINEAR = 300e-6
# bitsandbytes' optimizers update tensor by tensor from Python; torch's run over lists of tensors.
SECONDS_PER_OPTIMIZER_TENSOR = 120e-6
TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")

# Operations launched in one layer's forward, by part of the eager code.
NORM_OPERATIONS = 8
ROTARY_OPERATIONS = 11
ATTENTION_OPERATIONS = 4
MLP_OPERATIONS = 2
RESIDUAL_OPERATIONS = 2
ROUTER_OPERATIONS = 30
DEQUANTISE_OPERATIONS = 4
ADAPTER_OPERATIONS = 5
# A backward launches about two kernels for one of the forward.
BACKWARD_OPERATIONS = 2.0
# A compiled layer launches a handful of fused kernels beside its matmuls.
COMPILED_OPERATIONS = 12


def host_seconds(setup: TrainingSetup, model: ModelSpec) -> float:
    """Host time of one micro-step."""
    work = linear_work(model, setup.target_modules)
    passes = 1 + checkpointed_share(setup, model) + BACKWARD_OPERATIONS
    operations = sum(layer.count * _layer_operations(setup, layer) for layer in model.layers)
    if setup.method == "qlora":
        operations += work.linear_count * DEQUANTISE_OPERATIONS
    operations += work.linear_count
    if setup.uses_lora and setup.compile == "none":
        operations += work.wrapped_count * ADAPTER_OPERATIONS
    seconds = operations * passes * SECONDS_PER_OPERATION
    # A 4-bit layer runs Python on every call, compiled or not.
    if setup.method == "qlora" or (setup.uses_lora and setup.compile == "none"):
        seconds += work.wrapped_count * (passes - 1) * SECONDS_PER_WRAPPED_LINEAR
    return seconds


def optimizer_host_seconds(setup: TrainingSetup, work: LinearWork) -> float:
    """Host time of one optimizer step."""
    tensors = 2 * work.wrapped_count if setup.uses_lora else work.all_tensors
    if setup.optim in TORCH_OPTIMIZERS:
        return tensors * SECONDS_PER_OPTIMIZER_TENSOR / 10
    return tensors * SECONDS_PER_OPTIMIZER_TENSOR


def _layer_operations(setup: TrainingSetup, layer: LayerSpec) -> float:
    if setup.compile != "none":
        return COMPILED_OPERATIONS
    fused = setup.kernels == "liger"
    norms = 2 * (layer.input_norms + layer.output_norms) + (2 if layer.qk_norm != "none" else 0)
    operations = norms * (1 if fused else NORM_OPERATIONS)
    if layer.rotary:
        operations += 1 if fused else ROTARY_OPERATIONS
    operations += ATTENTION_OPERATIONS + RESIDUAL_OPERATIONS + (1 if fused else MLP_OPERATIONS)
    return operations + (ROUTER_OPERATIONS if layer.experts else 0)
