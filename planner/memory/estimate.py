"""estimate_memory: one GPU's memory for one setup, by phase and by component."""

from __future__ import annotations

from planner.gpu_spec import GpuSpec
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.head import HeadMemory, head_memory
from planner.memory.refusals import attention_implementation, refuse_unmodelled
from planner.memory.report import components, phases
from planner.memory.resident import Resident, resident_memory
from planner.memory.runtime import Coefficients, ReserveTerms, basis_of, coefficients_for
from planner.memory.segments import segments
from planner.memory.step_replay import replay_steps
from planner.memory.timeline import StepMoment, StepShape, StepTimeline
from planner.memory.weights import DTYPE_BYTES
from planner.model_spec import ModelSpec
from planner.training_setup import TrainingSetup


def estimate_memory(
    setup: TrainingSetup,
    model: ModelSpec,
    *,
    gpu: GpuSpec | None = None,
    padded: bool = False,
    coefficients: Coefficients | None = None,
    replay: bool = False,
) -> MemoryBreakdown:
    """Estimate one GPU's memory.

    `padded` says whether batches mix lengths (a mask is then built); `gpu` decides cuBLAS workspaces and
    which measured coefficients apply, unless `coefficients` are given. With `replay` allocated and reserved
    bytes are those of torch's allocator after whole steps, replayed (tens of milliseconds); without it live
    bytes are counted and what the allocator reserves beside them is fitted (a tenth of a millisecond).

    Raises:
        NotModelledError: a knob whose memory is not modelled.
        InputError: target_modules that the model does not have, or more checkpointed layers than it has.
    """
    refuse_unmodelled(setup, model)
    gpu_name = gpu.id if gpu else None
    measured = coefficients or coefficients_for(gpu_name)
    resident, timeline, step = _replayed(setup, model, gpu, measured, padded=padded)
    evaluation = timeline.forward_only(_head(setup, model, evaluating=True))
    terms = _reserve_terms(resident, timeline)
    replayed = replay_steps(setup, model, gpu=gpu, padded=padded) if replay else None
    found = phases(measured, resident, step, evaluation, terms, replayed)
    step_phase = found[1]
    return MemoryBreakdown(
        weights_bytes=resident.weights.allocated_bytes,
        allocated_bytes=step_phase.allocated_bytes,
        reserved_bytes=step_phase.reserved_bytes,
        process_bytes=step_phase.process_bytes,
        process_upper_bytes=step_phase.process_upper_bytes,
        components=components(setup, measured, resident, step, step_phase, replayed=replay),
        phases=found,
        basis=basis_of(measured, model, gpu_name, replayed=replay),
    )


def reserve_terms(
    setup: TrainingSetup, model: ModelSpec, *, gpu: GpuSpec | None, padded: bool
) -> ReserveTerms:
    """What the allocator's reserve is fitted to, for a setup that was measured."""
    measured = coefficients_for(gpu.id if gpu else None)
    resident, timeline, _ = _replayed(setup, model, gpu, measured, padded=padded)
    return _reserve_terms(resident, timeline)


def _replayed(
    setup: TrainingSetup, model: ModelSpec, gpu: GpuSpec | None, measured: Coefficients, *, padded: bool
) -> tuple[Resident, StepTimeline, StepMoment]:
    """What is there between steps, the step's timeline, and its peak."""
    resident = resident_memory(setup, model, gpu, measured, padded=padded)
    timeline = _timeline(setup, model, resident, padded=padded)
    step = max(
        timeline.largest(),
        timeline.optimizer_step(resident.optimizer.temporary_bytes),
        key=lambda moment: moment.total_bytes,
    )
    return resident, timeline, step


def _reserve_terms(resident: Resident, timeline: StepTimeline) -> ReserveTerms:
    return ReserveTerms(
        working_bytes=timeline.working_bytes(),
        head_bytes=timeline.head.backward_bytes,
        kept_bytes=timeline.kept_bytes,
        weight_bytes=resident.largest_dequantized_bytes,
        optimizer_bytes=resident.optimizer.temporary_bytes,
    )


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


def _timeline(setup: TrainingSetup, model: ModelSpec, resident: Resident, *, padded: bool) -> StepTimeline:
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
