"""Step time from a GPU's published rates: a forecast for GPUs that nobody has calibrated."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import InputError
from planner.gpu_spec import GpuSpec
from planner.model_spec import ModelSpec
from planner.throughput.flops import MatrixFlops, linear_work, matrix_flops
from planner.throughput.host import host_seconds, optimizer_host_seconds
from planner.throughput.traffic import Traffic, traffic
from planner.training_setup import TrainingSetup

# A large matmul as measured comes to 0.61 (RTX A6000) to 1.13 (RTX 5090, above its listed boost) of the
# published dense rate over the cards of profiles/gpus.toml with both; this stands in where none was measured.
MATMUL_OF_PUBLISHED = 0.85
# Layers' matmuls beside a large square one; fitted by eye to H100 and RTX 4090 runs (docs/throughput.md).
LAYERS_OF_MATMUL = 0.9
# Fused attention beside a large matmul: FlashAttention-2 reaches 0.5 to 0.7 of an A100's rate
# (arXiv:2307.08691, section 4), less of an H100's.
ATTENTION_OF_MATMUL = 0.5
# Streaming kernels beside the published bandwidth.
BANDWIDTH_OF_PUBLISHED = 0.8
# bfloat16 without hardware for it: 9.85 against 88.9 TFLOPS in float16 on a V100S, 5.14 against 39.0 on an
# RTX 2080 (https://github.com/fanghostt/transformers-benchmarks).
EMULATED_BFLOAT16 = 1 / 8.3

# Interval of an uncalibrated forecast, as factors of it; the runs of docs/throughput.md lie within.
LOW, HIGH = 0.65, 1.5


class NoForecastError(InputError):
    """No throughput can be given: a rate of the GPU is unknown, or a knob's time is not modelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """Time of a training step, steady state, full sequences.

    `tokens_per_second` counts all processes, the optimizer step spread over the accumulation; `_low` and
    `_high` are its interval, `roofline_tokens_per_second` what the matmuls and weights alone allow at the
    published (or a higher measured) rate, which no run exceeds. `matrix_flops` and `bytes_moved` are of one
    micro-step on one GPU. `bound_by` is "compute", "bandwidth" or "launches". `basis` says on what it rests.
    """

    seconds_per_micro_step: float
    seconds_per_optimizer_step: float
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    matrix_flops: float
    bytes_moved: float
    roofline_tokens_per_second: float
    bound_by: str
    calibrated: bool
    basis: str


def estimate_step(setup: TrainingSetup, model: ModelSpec, gpu: GpuSpec) -> StepEstimate:
    """Forecast a training step's time on a GPU from published rates.

    Time is the larger of what the GPU needs (matmuls, attention, memory traffic, one after the other) and
    what the host needs to launch it, plus the optimizer step once an accumulation.

    Raises:
        NoForecastError: the GPU's rates are unknown, or the setup has a knob without a time model.
    """
    _refuse_unmodelled(setup)
    peak, bandwidth = gpu.peak_matrix_flops_per_second, gpu.bandwidth_bytes_per_second
    if peak is None or bandwidth is None:
        raise NoForecastError(f"no throughput for {gpu.id}: its matrix rate or bandwidth is unknown")
    flops, moved = matrix_flops(setup, model), traffic(setup, model)
    work = linear_work(model, setup.target_modules)

    compute = _compute_seconds(setup, flops, gpu)
    memory = (moved.activations + moved.weights) / (bandwidth * BANDWIDTH_OF_PUBLISHED)
    host = host_seconds(setup, model)
    micro = max(compute + memory, host)
    optimizer = max(
        moved.optimizer / (bandwidth * BANDWIDTH_OF_PUBLISHED), optimizer_host_seconds(setup, work)
    )
    step = micro * setup.gradient_accumulation_steps + optimizer

    tokens = setup.tokens_per_micro_step * setup.num_processes
    rate = tokens * setup.gradient_accumulation_steps / step
    roofline = tokens / max(flops.total / peak, _certain_bytes(moved) / bandwidth)
    return StepEstimate(
        seconds_per_micro_step=micro,
        seconds_per_optimizer_step=step,
        tokens_per_second=rate,
        tokens_per_second_low=rate * LOW,
        tokens_per_second_high=min(rate * HIGH, roofline),
        matrix_flops=flops.total,
        bytes_moved=moved.activations + moved.weights,
        roofline_tokens_per_second=roofline,
        bound_by=_bound_by(compute, memory, host),
        calibrated=False,
        basis=_basis(gpu),
    )


def _refuse_unmodelled(setup: TrainingSetup) -> None:
    if setup.activation_offloading:
        raise NoForecastError("no throughput with activation_offloading: its transfers are not modelled yet")
    if setup.activation_memory_budget is not None:
        raise NoForecastError(
            "no throughput with activation_memory_budget: its recompute is not modelled yet"
        )
    if setup.distributed == "fsdp":
        raise NoForecastError("no throughput with distributed=fsdp: its communication is not modelled yet")
    if setup.distributed is not None and not setup.uses_lora:
        raise NoForecastError("no throughput with full fine-tuning on several GPUs: not modelled yet")


def _compute_seconds(setup: TrainingSetup, flops: MatrixFlops, gpu: GpuSpec) -> float:
    measured = gpu.measured_matrix_flops_per_second
    rate = measured if measured is not None else (gpu.matrix_flops_per_second or 0.0) * MATMUL_OF_PUBLISHED
    if setup.dtype != "float16" and not gpu.supports_bfloat16:
        rate *= EMULATED_BFLOAT16
    matmuls = (flops.layers + flops.adapter + flops.head) / (rate * LAYERS_OF_MATMUL)
    return matmuls + flops.attention / (rate * ATTENTION_OF_MATMUL)


def _certain_bytes(moved: Traffic) -> float:
    """Bytes that no cache can save: weights are larger than any GPU's cache, activations need not be."""
    return moved.weights


def _bound_by(compute: float, memory: float, host: float) -> str:
    if host >= compute + memory:
        return "launches"
    return "compute" if compute >= memory else "bandwidth"


def _basis(gpu: GpuSpec) -> str:
    rate = "a measured matmul rate" if gpu.measured_matrix_flops_per_second else "the published matrix rate"
    return (
        f"roofline of {gpu.id} ({rate} and bandwidth), efficiencies fitted by eye; not calibrated on this GPU"
    )
