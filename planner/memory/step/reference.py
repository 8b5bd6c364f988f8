"""The reference's forward pass within a step: the model that training began with, asked while everything that
the policy has kept for its backward pass is there (trl/trainer/dpo_trainer.py, _compute_loss).

With an adapter it is the same model, its adapter disabled; without one it is a second model. Nothing is kept:
it runs without gradients, and TRL takes checkpoints off for it.
"""

from __future__ import annotations

from planner.memory.allocators.native import CachingAllocator
from planner.memory.decoder.groups import layer_groups
from planner.memory.decoder.live_bytes import forward_alone, peak
from planner.memory.decoder.program import layer_program
from planner.memory.decoder.programs import ProgramSizes, SizedProgram
from planner.memory.step.inputs import InputsReplay
from planner.memory.step.output import OutputReplay
from planner.memory.step.resident import mask_bytes
from planner.memory.step.timeline import AtWork, StepMoment, StepTimeline
from planner.setup.run import TrainingRun


def reference_moments(run: TrainingRun, timeline: StepTimeline, tables_bytes: int) -> list[StepMoment]:
    """Moments of the reference's pass that can be a step's peak; none where it has none.

    `tables_bytes` are masks and rotary tables, which it makes anew; the policy's own masks are held by
    checkpoints alone.
    """
    if not run.setup.reference_passes:
        return []
    shape, held = timeline.shape, timeline.between_passes()
    hidden = shape.hidden_bytes_per_token * shape.tokens
    if not run.setup.gradient_checkpointing:
        tables_bytes -= mask_bytes(run)
    moments = []
    for group in layer_groups(run)[0]:
        _, moment = peak(
            forward_alone(group.layer, group.knobs.without_adapters()), shape.tokens, shape.scores
        )
        work = AtWork.of(moment, shape.tokens, shape.scores)
        moments.append(
            held._replace(
                name=f"reference's forward of decoder layer {group.indices[-1]}",
                live_bytes=held.live_bytes + work.live_bytes + 2 * hidden + tables_bytes,
                workspace_bytes=work.workspace_bytes,
            )
        )
    moments.append(
        held._replace(
            name="reference's output head", head_bytes=held.head_bytes + timeline.head.forward_bytes
        )
    )
    return moments


class ForwardReplay:
    """Passes of one run's micro-step that keep nothing, request by request: so many of them, with its
    adapters at work or without.
    """

    def __init__(
        self,
        run: TrainingRun,
        programs: ProgramSizes,
        inputs: InputsReplay,
        norm: SizedProgram,
        head: OutputReplay,
        *,
        passes: int,
        adapters: bool,
    ) -> None:
        self.passes = passes
        self.inputs, self.norm, self.head = inputs, norm, head
        self.layers = _layers_alone(run, programs, adapters=adapters) if passes else []

    def run(self, allocator: CachingAllocator) -> None:
        """Replay them, one after the other."""
        for _ in range(self.passes):
            embeddings, *tables = self.inputs.run(allocator)
            hidden = embeddings
            for sized in self.layers:
                own = [0] * len(sized.units)
                own[0] = hidden
                allocator.play(sized.forward, own)
                if hidden != embeddings:
                    allocator.free(hidden)
                for block in sized.program.casts:
                    allocator.free(own[block])
                hidden = own[sized.program.output]
            own = [0] * len(self.norm.units)
            own[0] = hidden
            allocator.play(self.norm.forward, own)
            for block in (*(own[kept] for kept in self.norm.program.kept), embeddings, *tables):
                allocator.free(block)
            self.head.forward(allocator, own[self.norm.program.output])


def passes_alone(
    run: TrainingRun, programs: ProgramSizes, inputs: InputsReplay, norm: SizedProgram, head: OutputReplay
) -> tuple[ForwardReplay, ForwardReplay]:
    """A micro-step's passes of the model as it is trained, and those of the reference."""
    policy, reference = run.setup.objective.policy_passes, run.setup.reference_passes
    return (
        ForwardReplay(run, programs, inputs, norm, head, passes=policy, adapters=True),
        ForwardReplay(run, programs, inputs, norm, head, passes=reference, adapters=False),
    )


def _layers_alone(run: TrainingRun, programs: ProgramSizes, *, adapters: bool) -> list[SizedProgram]:
    """Each layer's forward pass that keeps nothing, in the model's order."""
    found: dict[int, SizedProgram] = {}
    for group in layer_groups(run)[0]:
        program = layer_program(
            group.layer,
            group.knobs if adapters else group.knobs.without_adapters(),
            checkpointed=True,
            input_requires_grad=True,
            accumulating=False,
        )
        found |= dict.fromkeys(group.indices, programs.of(program))
    return [found[index] for index in sorted(found)]
