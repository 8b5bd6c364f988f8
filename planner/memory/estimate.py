"""estimate_memory: one GPU's memory for one setup, by phase and by component."""

from __future__ import annotations

from dataclasses import dataclass

from planner.gpu_spec import GpuSpec
from planner.memory.adapter import Trainables, trainables
from planner.memory.breakdown import Component, MemoryBreakdown, PhaseMemory
from planner.memory.head import HeadMemory, head_memory
from planner.memory.optimizer import OptimizerMemory, optimizer_memory
from planner.memory.refusals import attention_implementation, refuse_unmodelled
from planner.memory.runtime import (
    Coefficients,
    ReserveTerms,
    basis_of,
    coefficients_for,
    cublas_workspace_bytes,
    managed_process_bytes,
)
from planner.memory.segments import segments
from planner.memory.timeline import StepMoment, StepShape, StepTimeline
from planner.memory.weights import DTYPE_BYTES, WeightMemory, is_quantized, weight_memory
from planner.model_spec import ModelSpec
from planner.training_setup import TrainingSetup

INPUT_BYTES_PER_TOKEN = 3 * 8
"""input_ids, labels and attention_mask as int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Resident:
    """What is on the GPU between steps, in torch's allocator unless said otherwise."""

    weights: WeightMemory
    trained: Trainables
    adapter_bytes: int
    optimizer: OptimizerMemory
    cublas_bytes: int
    tables_bytes: int
    largest_dequantized_bytes: int

    @property
    def allocated_bytes(self) -> int:
        return (
            self.weights.allocated_bytes
            + self.adapter_bytes
            + self.optimizer.allocated_bytes
            + self.cublas_bytes
            + self.tables_bytes
        )


def estimate_memory(
    setup: TrainingSetup,
    model: ModelSpec,
    *,
    gpu: GpuSpec | None = None,
    padded: bool = False,
    coefficients: Coefficients | None = None,
) -> MemoryBreakdown:
    """Estimate one GPU's memory.

    `padded` says whether batches mix lengths (a mask is then built); `gpu` decides cuBLAS workspaces and
    which measured coefficients apply, unless `coefficients` are given.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
        InputError: target_modules that the model does not have, or more checkpointed layers than it has.
    """
    refuse_unmodelled(setup, model)
    gpu_name = gpu.id if gpu else None
    measured = coefficients or coefficients_for(gpu_name)
    resident, timeline, step = _replayed(setup, model, gpu, measured, padded=padded)
    evaluation = timeline.forward_only(_head(setup, model, evaluating=True))
    terms = _reserve_terms(resident, timeline, step)
    phases = _phases(measured, resident, step, evaluation, terms)
    step_phase = phases[1]
    return MemoryBreakdown(
        weights_bytes=resident.weights.allocated_bytes,
        allocated_bytes=step_phase.allocated_bytes,
        reserved_bytes=step_phase.reserved_bytes,
        process_bytes=step_phase.process_bytes,
        process_upper_bytes=step_phase.process_upper_bytes,
        components=_components(setup, measured, resident, step, step_phase),
        phases=phases,
        basis=basis_of(measured, model, gpu_name),
    )


def reserve_terms(
    setup: TrainingSetup, model: ModelSpec, *, gpu: GpuSpec | None, padded: bool
) -> ReserveTerms:
    """What the allocator's reserve is fitted to, for a setup that was measured."""
    measured = coefficients_for(gpu.id if gpu else None)
    return _reserve_terms(*_replayed(setup, model, gpu, measured, padded=padded))


def _replayed(
    setup: TrainingSetup, model: ModelSpec, gpu: GpuSpec | None, measured: Coefficients, *, padded: bool
) -> tuple[_Resident, StepTimeline, StepMoment]:
    """What is there between steps, the step's timeline, and its peak."""
    resident = _resident(setup, model, gpu, measured, padded=padded)
    timeline = _timeline(setup, model, resident, padded=padded)
    step = max(
        timeline.largest(),
        timeline.optimizer_step(resident.optimizer.temporary_bytes),
        key=lambda moment: moment.total_bytes,
    )
    return resident, timeline, step


def _reserve_terms(resident: _Resident, timeline: StepTimeline, step: StepMoment) -> ReserveTerms:
    return ReserveTerms(
        working_bytes=timeline.working_bytes(),
        head_bytes=timeline.head.backward_bytes,
        kept_bytes=step.kept_bytes,
        weight_bytes=resident.largest_dequantized_bytes,
        optimizer_bytes=resident.optimizer.temporary_bytes,
    )


def _resident(
    setup: TrainingSetup, model: ModelSpec, gpu: GpuSpec | None, measured: Coefficients, *, padded: bool
) -> _Resident:
    weights = weight_memory(setup, model)
    trained = trainables(setup, model)
    width = DTYPE_BYTES[setup.dtype]
    layer = model.layers[0]
    rotary = model.rotary_tables * 2 * setup.max_length * (layer.rotary_dim or layer.head_dim) * width
    masks = _mask_bytes(setup, model, padded=padded)
    return _Resident(
        weights=weights,
        trained=trained,
        adapter_bytes=trained.allocated_bytes if setup.uses_lora else 0,
        optimizer=optimizer_memory(setup.optim, trained),
        cublas_bytes=cublas_workspace_bytes(gpu, measured),
        tables_bytes=rotary + masks + INPUT_BYTES_PER_TOKEN * setup.tokens_per_micro_step,
        largest_dequantized_bytes=_largest_quantized(model) * width if setup.method == "qlora" else 0,
    )


def _mask_bytes(setup: TrainingSetup, model: ModelSpec, *, padded: bool) -> int:
    """Attention masks, one for each kind of layer that needs one: additive for eager, boolean for sdpa.

    sdpa needs none for full sequences that no window cuts (transformers masking_utils.py, sdpa_mask).
    """
    kinds = {layer.sliding_window for layer in model.layers}
    elements = setup.per_device_train_batch_size * setup.max_length**2
    if attention_implementation(setup, model) == "eager":
        return len(kinds) * elements * DTYPE_BYTES[setup.dtype]
    needed = [w for w in kinds if padded or (w is not None and w < setup.max_length)]
    return len(needed) * elements


_LARGEST: dict[tuple[str, int], int] = {}


def _largest_quantized(model: ModelSpec) -> int:
    key = (model.id, model.parameter_count)
    if key not in _LARGEST:
        _LARGEST[key] = max((p.elements for p in model.parameters if is_quantized(p)), default=0)
    return _LARGEST[key]


def _head(setup: TrainingSetup, model: ModelSpec, *, evaluating: bool = False) -> HeadMemory:
    return head_memory(
        tokens=setup.tokens_per_micro_step,
        sequences=setup.per_device_train_batch_size,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        width=DTYPE_BYTES[setup.dtype],
        trained=setup.method == "full",
        evaluating=evaluating,
    )


def _timeline(setup: TrainingSetup, model: ModelSpec, resident: _Resident, *, padded: bool) -> StepTimeline:
    attention = attention_implementation(setup, model)
    parts, final_norm = segments(setup, model, resident.trained, attention=attention, padded=padded)
    width = DTYPE_BYTES[setup.dtype]
    embedding = model.vocab_size * model.hidden_size * width if setup.method == "full" else 0
    scaled = model.embedding_multiplier and not any("Scaled" in p.module_class for p in model.parameters)
    return StepTimeline(
        parts=parts,
        raw_embedding=scaled and setup.uses_lora and setup.gradient_checkpointing,
        final_norm=final_norm,
        head=_head(setup, model),
        trained=resident.trained,
        embedding_gradient_bytes=embedding,
        tied=model.tied_embeddings,
        shape=StepShape(
            tokens=setup.tokens_per_micro_step,
            scores=setup.per_device_train_batch_size * setup.max_length**2,
            hidden_bytes_per_token=model.hidden_size * width,
            accumulating=setup.gradient_accumulation_steps > 1,
        ),
    )


def _phases(
    measured: Coefficients,
    resident: _Resident,
    step: StepMoment,
    evaluation: StepMoment,
    terms: ReserveTerms,
) -> tuple[PhaseMemory, ...]:
    outside = measured.context_bytes + managed_process_bytes(resident.optimizer.managed_bytes)
    reserve, margin = measured.reserve_bytes(terms), measured.margin(terms)
    step_allocated = resident.allocated_bytes + step.total_bytes
    step_reserved = step_allocated + reserve
    load = resident.weights.allocated_bytes + resident.largest_dequantized_bytes
    evaluated = resident.allocated_bytes + evaluation.total_bytes
    rows = (
        (
            "load",
            "quantising the largest weight" if resident.largest_dequantized_bytes else "the last weight",
            load,
            load,
            measured.context_bytes,
        ),
        ("step", step.name, step_allocated, step_reserved, outside),
        ("evaluation", evaluation.name, evaluated, max(evaluated, step_reserved), outside),
        (
            "save",
            "adapter and state are copied to the host",
            resident.allocated_bytes,
            step_reserved,
            outside,
        ),
    )
    return tuple(
        PhaseMemory(
            name=name,
            peak_moment=moment,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            process_bytes=reserved + beyond,
            process_upper_bytes=reserved + beyond + (measured.margin_bytes if name == "load" else margin),
        )
        for name, moment, allocated, reserved, beyond in rows
    )


def _components(
    setup: TrainingSetup, measured: Coefficients, resident: _Resident, step: StepMoment, phase: PhaseMemory
) -> tuple[Component, ...]:
    weights, optimizer = resident.weights, resident.optimizer
    width = DTYPE_BYTES[setup.dtype] * 8
    managed = managed_process_bytes(optimizer.managed_bytes)
    rows = (
        (
            "weights_4bit",
            "weights in 4 bits",
            weights.quantized_bytes,
            "half a byte for each quantised weight",
        ),
        (
            "weights_unquantized",
            f"weights kept in {width} bits",
            weights.unquantized_bytes,
            "embeddings, output head, norms, biases, routers and experts as transformers leaves them",
        ),
        (
            "quantization_constants",
            "quantisation constants",
            weights.constants_bytes,
            "bitsandbytes: one constant per 64 weights, themselves quantised with double quantisation",
        ),
        ("adapter", "adapter", resident.adapter_bytes, "rank x (inputs + outputs) of each target module"),
        (
            "gradients",
            "gradients",
            step.gradient_bytes,
            "in the trained parameters' dtype, alive at the peak",
        ),
        (
            "optimizer",
            "optimizer",
            optimizer.allocated_bytes + managed,
            f"{setup.optim}: state by tensor, as torch or bitsandbytes lays it out",
        ),
        (
            "activations",
            "activations",
            step.kept_bytes + step.live_bytes + resident.tables_bytes,
            "checkpoints, what layers save for backward, and the layer at work",
        ),
        ("head_and_loss", "head and loss", step.head_bytes, "TRL's tiled log-probabilities"),
        (
            "workspace",
            "workspace",
            step.workspace_bytes + resident.cublas_bytes,
            "dequantised weights of the layer at work, optimizer temporaries, cuBLAS",
        ),
        (
            "allocator",
            "allocator reserve",
            weights.rounding_bytes + phase.reserved_bytes - phase.allocated_bytes,
            "rounding, and cached blocks that do not fit what is asked for (measured)",
        ),
        (
            "context",
            "CUDA context",
            measured.context_bytes,
            f"context, kernels and libraries (measured: {measured.name})",
        ),
    )
    return tuple(
        Component(name=name, title=title, size_bytes=size, origin=origin)
        for name, title, size, origin in rows
    )
