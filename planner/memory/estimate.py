"""estimate_memory: one GPU's memory for one run, by phase and by component."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.memory.allocators.native import OutOfAddressesError
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.decoder.groups import layer_groups, leaving_width
from planner.memory.held.embedding import embedding_scratch_bytes
from planner.memory.held.head import HeadMemory, HeadShape, head_memory, head_shape
from planner.memory.held.logits import logits_memory
from planner.memory.held.score import score_memory
from planner.memory.measured.coefficients import Coefficients, ReserveTerms, basis_of, interval_kind
from planner.memory.measured.cuda_terms import NO_NCCL, NcclMemory, offloading_context_bytes
from planner.memory.measured.files import coefficients_for
from planner.memory.refusals import refuse_unmodelled
from planner.memory.report import components, outside_bytes, phases
from planner.memory.step.images import image_memory
from planner.memory.step.reference import reference_moments
from planner.memory.step.replay import replay_steps
from planner.memory.step.replayed import OverRoomError, ReplayedMemory
from planner.memory.step.resident import Resident, resident_memory
from planner.memory.step.timeline import StepMoment, StepShape, StepTimeline
from planner.setup.cuda_allocator import planned_allocator
from planner.setup.run import TrainingRun


def estimate_memory(
    run: TrainingRun,
    *,
    gpu: GpuSpec | None = None,
    coefficients: Coefficients | None = None,
    replay: bool = False,
    limit_bytes: int | None = None,
    allocator: str | None = None,
) -> MemoryBreakdown:
    """Estimate one GPU's memory.

    `gpu` decides cuBLAS workspaces and which measured coefficients apply, unless `coefficients` are given.
    With `replay` allocated and reserved bytes are those of torch's allocator after whole steps, replayed
    (tens of milliseconds); without it live bytes are counted and what the allocator reserves beside them is
    fitted (a tenth of a millisecond). A replay ends early once more than `limit_bytes` are needed: what it
    then says is that it is too much. What needs terabytes, for which a replay has no addresses, keeps the
    fitted figures; the basis says so. `allocator` is the one that torch is told to use
    (planner/setup/cuda_allocator.py), null for the one that a run started from here would get.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
        InputError: target_modules that the model does not have, or more checkpointed layers than it has.
    """
    refuse_unmodelled(run)
    gpu_name = gpu.id if gpu else None
    allocator = allocator or planned_allocator()
    measured = coefficients or coefficients_for(gpu_name, allocator)
    live = live_memory(run, gpu=gpu, coefficients=measured, allocator=allocator)
    resident, timeline, step = live.resident, live.timeline, live.peak
    evaluation = timeline.forward_only()
    terms = _reserve_terms(resident, timeline)
    nccl, loaded_context = _nccl(run, gpu), measured.context_on(gpu).expected_bytes
    context = loaded_context + offloading_context_bytes(run.setup)
    limit = None if limit_bytes is None else limit_bytes - context - nccl.expected_bytes
    replayed = _replayed(run, gpu, allocator, limit) if replay else None
    distance = measured.distance(run, gpu)
    parts = (measured, resident, step, evaluation, terms, replayed, distance)
    found = phases(
        *parts,
        kind=interval_kind(run.setup),
        context_bytes=context,
        loaded_context_bytes=loaded_context,
        nccl=nccl,
        pools_bytes=timeline.pool_bytes,
    )
    there = found[1]
    return MemoryBreakdown(
        weights_bytes=resident.weights.allocated_bytes,
        allocated_bytes=there.allocated_bytes,
        reserved_bytes=there.reserved_bytes,
        process_bytes=there.process_bytes,
        process_upper_bytes=there.process_upper_bytes,
        components=components(
            run, measured, resident, step, there, nccl, context_bytes=context, replayed=replayed is not None
        ),
        phases=found,
        basis=basis_of(
            measured, run.model, gpu, distance, replayed=replayed is not None, counted=run.stack.counted
        ),
    )


def surely_exceeds(
    run: TrainingRun, *, gpu: GpuSpec, usable_bytes: int, allocator: str | None = None
) -> bool:
    """Whether the allocator's replay shows that a run does not fit, which it may long before its end; where
    it does not, it has come to its end, is remembered, and what `estimate_memory` makes of it decides.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
        InputError: target_modules that the model does not have, or more checkpointed layers than it has.
    """
    refuse_unmodelled(run)
    allocator = allocator or planned_allocator()
    measured = coefficients_for(gpu.id, allocator)
    resident = resident_memory(run, gpu, measured, allocator=allocator)
    nccl, kind = _nccl(run, gpu), interval_kind(run.setup)
    context = measured.context_on(gpu).expected_bytes + offloading_context_bytes(run.setup)
    left = usable_bytes - outside_bytes(resident, context, nccl)
    distance = measured.distance(run, gpu)

    def room(largest_block_bytes: int) -> int:
        return left - distance.widened(measured.replay_margin(largest_block_bytes, kind)) - nccl.spread_bytes

    limit = usable_bytes - context - nccl.expected_bytes
    try:
        replay_steps(run, gpu=gpu, allocator=allocator, limit_bytes=limit, room=room)
    except OverRoomError:
        return True
    except OutOfAddressesError:
        return False
    return False


def _replayed(
    run: TrainingRun, gpu: GpuSpec | None, allocator: str, limit_bytes: int | None
) -> ReplayedMemory | None:
    """The allocator's replay; None where it needs more than the replay has addresses for."""
    with suppress(OutOfAddressesError):
        return replay_steps(run, gpu=gpu, allocator=allocator, limit_bytes=limit_bytes)
    return None


def _nccl(run: TrainingRun, gpu: GpuSpec | None) -> NcclMemory:
    if run.parallelism.is_single:
        return NO_NCCL
    from planner.memory.measured.nccl import nccl_memory

    return nccl_memory(run, gpu)


def reserve_terms(run: TrainingRun, *, gpu: GpuSpec | None, allocator: str) -> ReserveTerms:
    """What the allocator's reserve is fitted to, for a run that was measured."""
    measured = coefficients_for(gpu.id if gpu else None, allocator)
    live = live_memory(run, gpu=gpu, coefficients=measured, allocator=allocator)
    return _reserve_terms(live.resident, live.timeline)


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveMemory:
    """What is there between steps, the step's timeline, and the moment of its peak."""

    resident: Resident
    timeline: StepTimeline
    peak: StepMoment


def live_memory(
    run: TrainingRun, *, gpu: GpuSpec | None, coefficients: Coefficients, allocator: str
) -> LiveMemory:
    """Count a run's live bytes.

    Raises:
        InputError: target_modules that the model does not have.
    """
    resident = resident_memory(run, gpu, coefficients, allocator=allocator)
    timeline = _timeline(run)
    step = max(
        timeline.largest(),
        *reference_moments(run, timeline, resident.tables_bytes),
        timeline.optimizer_step(resident.optimizer.temporary_bytes),
        key=lambda moment: moment.total_bytes,
    )
    return LiveMemory(resident=resident, timeline=timeline, peak=step)


def _reserve_terms(resident: Resident, timeline: StepTimeline) -> ReserveTerms:
    return ReserveTerms(
        working_bytes=timeline.working_bytes(),
        head_bytes=timeline.head.backward_bytes,
        kept_bytes=timeline.kept_bytes,
        weight_bytes=resident.largest_dequantized_bytes,
        optimizer_bytes=resident.optimizer.temporary_bytes,
    )


def _head_memory(shape: HeadShape) -> HeadMemory:
    if shape.scores:
        return score_memory(shape)
    return logits_memory(shape) if shape.whole else head_memory(shape)


def _timeline(run: TrainingRun) -> StepTimeline:
    groups, final_norm = layer_groups(run)
    shape, model = run.micro_step, run.model
    head = head_shape(run, final_norm.output_width)
    table, trained = model.vocab_size * model.hidden_size * run.storage.width, run.trained
    parts: dict[str, Any] = {
        "groups": groups,
        "offloads": run.setup.activation_offloading,
        "stash": run.stack.offload_stash,
        "raw_embedding": run.keeps_raw_embedding,
        "final_norm": final_norm,
        "head": _head_memory(head),
        "trained": trained,
        "embedding_gradient_bytes": table if trained.reaches_embedding else 0,
        "embedding_scratch_bytes": embedding_scratch_bytes(shape.tokens, model.vocab_size, model.hidden_size),
        "tied": model.tied_embeddings,
        "images": image_memory(run),
        "embedding_copy_bytes": table if trained.token_rows else 0,
        "shape": StepShape(
            tokens=shape.tokens,
            scores=shape.scores,
            hidden_bytes_per_token=model.hidden_size * shape.stream_width,
            leaving_bytes_per_token=model.hidden_size * leaving_width(run),
            accumulating=run.setup.gradient_accumulation_steps > 1,
        ),
    }
    if run.parallelism.is_single:
        return StepTimeline(**parts)
    from planner.memory.step.several_timelines import timeline_of_several

    return timeline_of_several(run, parts)
