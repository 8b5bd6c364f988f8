"""Provisional stand-in with the final signature, replaced by the phase timeline."""

from __future__ import annotations

from planner.memory.breakdown import Basis, Component, MemoryBreakdown, PhaseMemory
from planner.model_spec import ModelSpec
from planner.training_setup import TrainingSetup


def estimate_memory(setup: TrainingSetup, model: ModelSpec, *, padded: bool = False) -> MemoryBreakdown:
    """Estimate one GPU's memory; `padded` says whether batches mix lengths (a mask is then built).

    Raises:
        NotModelledError: a knob whose memory is not modelled.
        InputError: target_modules that the model does not have, or more checkpointed layers than it has.
    """
    weights = int(model.parameter_count * (0.55 if setup.method == "qlora" else 2))
    activations = setup.tokens_per_micro_step * model.hidden_size * 2 * model.num_hidden_layers
    total = weights + activations + 2**30
    phase = PhaseMemory(
        name="step",
        peak_moment="backward of the last decoder layer",
        allocated_bytes=weights + activations,
        reserved_bytes=weights + activations + 2**28,
        process_bytes=total,
        process_upper_bytes=int(total * 1.05),
    )
    return MemoryBreakdown(
        weights_bytes=weights,
        allocated_bytes=phase.allocated_bytes,
        reserved_bytes=phase.reserved_bytes,
        process_bytes=total,
        process_upper_bytes=phase.process_upper_bytes,
        components=(
            Component(
                name="weights_4bit", title="weights in 4 bits", size_bytes=weights, origin="provisional"
            ),
            Component(name="activations", title="activations", size_bytes=activations, origin="provisional"),
            Component(name="context", title="CUDA context", size_bytes=2**30, origin="provisional"),
        ),
        phases=(phase,),
        basis=Basis(coefficients="provisional", record_count=0, stack_versions=(), measured=False),
    )
