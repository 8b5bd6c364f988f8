"""Whole training steps through torch's caching allocator: allocated and reserved bytes without a coefficient.

Loading, the adapter, then optimizer steps as TRL's trainer runs them, every request in its order: reserved
memory follows the history of requests, so only their replay tells it. Orders outside the decoder layers are
those of allocation traces (tests/stack/traces).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from planner.gpus.spec import GpuSpec
from planner.memory.allocators.native import MIN_BLOCK
from planner.memory.decoder.groups import layer_groups
from planner.memory.decoder.live_bytes import at
from planner.memory.decoder.program import norm_program
from planner.memory.decoder.programs import ProgramSizes, SizedProgram, replayed_layers
from planner.memory.held.embedding import embedding_scratch_bytes
from planner.memory.held.head import head_shape
from planner.memory.measured.cuda_terms import CUBLASLT_WORKSPACE_BYTES
from planner.memory.step.inputs import InputsReplay
from planner.memory.step.loading import loaded_allocator
from planner.memory.step.offload import offload_replay
from planner.memory.step.optimizer import OptimizerReplay
from planner.memory.step.output import output_replay
from planner.memory.step.reference import passes_alone
from planner.memory.step.replayed import ADAPTER_STEPS, FULL_STEPS, CudaSizes, OverRoomError, ReplayedMemory
from planner.setup.run import TrainingRun

if TYPE_CHECKING:
    from planner.memory.step.buckets import BucketReplay
    from planner.memory.step.sharding import ShardReplay

MAX_KNOWN = 4096
INT64 = 8

_WHOLE: dict[tuple[TrainingRun, CudaSizes, str], ReplayedMemory] = {}
"""Replays that ran to their end, MAX_KNOWN of them at most."""


def replay_steps(
    run: TrainingRun,
    *,
    gpu: GpuSpec | None,
    allocator: str,
    limit_bytes: int | None = None,
    room: Callable[[int], int] | None = None,
) -> ReplayedMemory:
    """Replay loading and as many optimizer steps as reach steady state.

    With `limit_bytes` a replay ends after the first step that reserves more: the result says so much. `room`
    gives the bytes that the steps may reserve from the largest block that they ask for.

    Raises:
        OverRoomError: it is certain that more than `room` will be reserved; before the end, if it can be.
        OutOfAddressesError: it needs terabytes, more than the replay has addresses for.
        InputError: target_modules that the model does not have.
    """
    sizes = CudaSizes.of(gpu)
    known = _WHOLE.get((run, sizes, allocator))
    if known is None:
        if len(_WHOLE) >= MAX_KNOWN:
            _WHOLE.clear()
        replay = StepReplay(run, sizes, allocator)
        known = replay.play(limit_bytes, None if room is None else room(replay.largest_block_bytes))
        if replay.whole:
            _WHOLE[run, sizes, allocator] = known
        elif room is not None:
            raise OverRoomError
    return known


class StepReplay:
    """One run's training through an allocator of its own."""

    def __init__(self, run: TrainingRun, sizes: CudaSizes, allocator: str) -> None:
        self.setup, self.model, self.trained = run.setup, run.model, run.trained
        self.tokens, self.scores = run.micro_step.tokens, run.micro_step.scores
        self.width, self.workspace_bytes = run.storage.width, sizes.workspace_bytes
        self.loaded = loaded_allocator(run, allocator)
        self.allocator = self.loaded.allocator.copy()
        self.sharding: ShardReplay | None = None
        self.buckets: BucketReplay | None = None
        if run.parallelism.shards:
            from planner.memory.step.sharding import ShardReplay

            self.sharding = ShardReplay(run, self.allocator)
        elif run.parallelism.replicates:
            from planner.memory.step.buckets import BucketReplay

            self.buckets = BucketReplay(run, self.allocator)
        self.inputs = InputsReplay(run)
        groups, final_norm = layer_groups(run)
        programs = ProgramSizes(self.tokens, self.scores)
        # DDP copies gradients to where they stay.
        accumulates = run.setup.gradient_accumulation_steps > 1 or run.parallelism.replicates
        self.layers = replayed_layers(
            groups, programs, accumulates=accumulates, tuning_bytes=sizes.tuning_bytes
        )
        last = max(groups, key=lambda group: group.indices[-1])
        knobs = replace(last.knobs, stream_width=last.memory.output_width)
        self.norm = programs.of(norm_program(run.model.norm_layer, knobs))
        self.head = output_replay(head_shape(run, final_norm.output_width))
        self.optimizer = OptimizerReplay(run)
        self.policy, self.reference = passes_alone(run, programs, self.inputs, self.norm, self.head)
        self.biased = run.model.has_biased_linear
        kept = int(at(final_norm.saved, self.tokens, self.scores))
        self.offload = offload_replay(run, self.allocator, self.inputs.stream_bytes, kept)
        self.gradients: list[int] = []
        # Bytes above which the step at work ends the replay: what it reserves it keeps; then it is not whole.
        self.room: int | None = None
        self.whole = True

    def play(self, limit_bytes: int | None = None, room_bytes: int | None = None) -> ReplayedMemory:
        """Replay optimizer steps, with as few micro-steps as have every kind of them in the last; end early
        once more than the limit is reserved.

        Raises:
            OverRoomError: what is reserved at the end will be more than the room.
        """
        allocator = self.allocator
        # The first step's second micro-step would leave adapters' small gradients where they are.
        short = not (self.trained.embedding or self.trained.head)
        steps = ADAPTER_STEPS if short and self.setup.gradient_checkpointing else FULL_STEPS
        begun: object = None
        for step in range(steps):
            if step and self.offload is None:
                before, begun = begun, allocator.state()
                if begun == before:
                    # It would do what the last one did, which was no first one either.
                    break
            allocator.reset_peak()
            if self.offload is not None:
                self.offload.reset_peak()
            if self.sharding is not None:
                self.sharding.reset_peak()
            if self.buckets is not None:
                self.buckets.begin_step(step)
            # Emptying the cache gives some of it back.
            self.room = room_bytes if self.offload is None or step + 1 == steps else None
            self.optimizer_step(first=step == 0, short=short and step == 0)
            self._refuse_over_room()
            if limit_bytes is not None and self._reserved_bytes > limit_bytes:
                self.whole = step + 1 == steps
                break
            if self.offload is not None and step + 1 < steps:
                # TRL empties the cache after every step (activation_offloading.py:602).
                allocator.empty_cache()
                self.offload.stream.empty_cache()
        peak, fetched = allocator.peak_allocated_bytes, 0
        if self.offload is not None:
            self.offload.mark()
            peak, fetched = self.offload.peak_bytes, self.offload.fetched_bytes
        if self.sharding is not None:
            self.sharding.mark()
            peak = self.sharding.peak_bytes
        return ReplayedMemory(
            load_allocated_bytes=self.loaded.peak_bytes,
            load_reserved_bytes=self.loaded.reserved_bytes,
            step_allocated_bytes=peak,
            step_reserved_bytes=self._reserved_bytes + fetched,
            largest_block_bytes=self.largest_block_bytes,
        )

    @property
    def _reserved_bytes(self) -> int:
        """Bytes that are reserved, those of the streams that gather and reduce among them."""
        others = 0 if self.sharding is None else self.sharding.reserved_bytes
        return self.allocator.reserved_bytes + others

    def optimizer_step(self, *, first: bool, short: bool = False) -> None:
        """Replay one optimizer step, the `first` being where cuBLAS and the optimizer take what they keep.

        Two micro-steps stand for any number of them; a `short` step has one.
        """
        inputs = self.allocator.allocate_all([*[INT64 * self.tokens] * 3, *self.inputs.image_blocks])
        micro_steps = 1 if short else min(2, self.setup.gradient_accumulation_steps)
        for number in range(micro_steps):
            self._micro_step(first=first and number == 0, later=number > 0, last=number == micro_steps - 1)
        self.allocator.free_all(inputs)
        if self.sharding is None:
            self.allocator.free(self._take(self.optimizer.clipping_bytes))
        self.optimizer.step(self.allocator, first=first)
        self.allocator.free_all(self._taken_gradients())
        if self.sharding is not None:
            self.sharding.zero_grad()

    def _refuse_over_room(self) -> None:
        if self.room is not None:
            fetched = 0 if self.offload is None else self.offload.fetched_bytes
            if self._reserved_bytes + fetched > self.room:
                raise OverRoomError

    @property
    def largest_block_bytes(self) -> int:
        """The largest block that a step asks for."""
        lists = [self.norm.units, *(layer.first.units for layer in self.layers)]
        units = max(max(sizes) for sizes in lists)
        sharded = 0 if self.sharding is None else self.sharding.largest_bytes
        return max(units * MIN_BLOCK, self.head.largest_bytes, self.optimizer.largest_bytes, sharded)

    def _take(self, size: float) -> int:
        return self.allocator.allocate(int(size))

    def _micro_step(self, *, first: bool, later: bool, last: bool) -> None:
        allocator, offload, sharding = self.allocator, self.offload, self.sharding
        later = self._adds(later=later, last=last)
        layers = [layer.of(new=first, later=later) for layer in self.layers]
        self.policy.run(allocator)
        if sharding is not None:
            sharding.before_embedding()
        held = self.inputs.run(allocator, first=first)
        if sharding is not None:
            sharding.after_embedding()
        slots = self._forward(layers, held[0], takes_workspaces=first)
        hidden = slots[-1][layers[-1].program.output]
        casts = [own[cast] for sized, own in zip(layers, slots, strict=True) for cast in sized.program.casts]
        embeddings = None if layers[0].program.keeps_input else held[0]
        gradient = self._head(hidden, casts, embeddings, first=first, later=later, last=last)
        self._refuse_over_room()
        if offload is not None:
            offload.mark()
        if first and self.biased and self.setup.gradient_checkpointing:
            self._take(CUBLASLT_WORKSPACE_BYTES)
        # PEFT makes a leaf of the embeddings' output, and offloading passes it over: it stays to the end.
        leaf = not self.trained.reaches_embedding or offload is not None
        gradient = self._backward(layers, slots, gradient, leaf=leaf, last=last)
        if layers[0].program.outgoing is not None:
            if self.trained.reaches_embedding:
                # Masks and tables are the layers', and end with the first one's backward pass.
                allocator.free_all(held[self.inputs.raw :])
                del held[self.inputs.raw :]
                self._embedding_backward(gradient, later=later)
            else:
                allocator.free(gradient)
        if sharding is not None:
            sharding.end_backward(self._taken_gradients(), last=last)
        if layers[0].program.checkpointed and leaf:
            allocator.free(slots[0][0])
        allocator.free_all(held[1:])

    def _adds(self, *, later: bool, last: bool) -> bool:
        """Whether a micro-step adds its gradients to tensors that are there: those of an earlier one, or
        DDP's buckets. FSDP2 may take those of every one.
        """
        if self.sharding is not None and self.sharding.takes_all:
            return False
        return later or (self.buckets is not None and last)

    def _forward(
        self, layers: Sequence[SizedProgram], hidden: int, *, takes_workspaces: bool
    ) -> list[list[int]]:
        """The layers' forward passes; returns the blocks of each by their numbers in its program."""
        allocator, offload = self.allocator, self.offload
        slots: list[list[int]] = []
        for index, sized in enumerate(layers):
            program = sized.program
            own = [0] * len(sized.units)
            own[0] = hidden
            if self.sharding is not None:
                self.sharding.before_forward(index)
            if index:
                allocator.play(sized.forward, own)
            else:
                to_product, from_product = sized.first_forward
                allocator.play(to_product, own)
                if takes_workspaces:
                    self._take_workspaces()
                allocator.play(from_product, own)
            hidden = own[program.output]
            slots.append(own)
            if self.sharding is not None:
                self.sharding.after_forward()
            if offload is not None and (index or not program.keeps_input_alone):
                offload.keep([own[block] for block in offload.blocks_of(program)])
        if offload is not None:
            offload.mark()
            offload.end_forward()
        allocator.free_all(self.inputs.forward_only)
        return slots

    def _backward(
        self,
        layers: Sequence[SizedProgram],
        slots: Sequence[list[int]],
        gradient: int,
        *,
        leaf: bool,
        last: bool,
    ) -> int:
        """The layers' backward passes; returns the first one's input gradient. A `leaf` input stays."""
        allocator, offload, sharding = self.allocator, self.offload, self.sharding
        for index in reversed(range(len(layers))):
            sized, own = layers[index], slots[index]
            program = sized.program
            own[program.incoming] = gradient
            if sharding is not None:
                sharding.before_backward(index)
            if offload is not None and (index or not program.keeps_input_alone):
                offload.run_backward(sized, own)
            elif program.checkpointed and (index or not leaf):
                to_input, from_input = sized.checkpointed_backward
                allocator.play(to_input, own)
                allocator.free(own[0])
                allocator.play(from_input, own)
            else:
                allocator.play(sized.backward, own)
            self.gradients += [own[block] for block in program.gradients]
            if program.outgoing is not None:
                gradient = own[program.outgoing]
            if sharding is not None:
                sharding.after_backward(index, self._taken_gradients(), last=last)
            self._refuse_over_room()
        if offload is not None:
            offload.end_backward()
        return gradient

    def _take_workspaces(self) -> None:
        """What cuBLAS takes with the main thread's first matrix product, which is the first layer's."""
        self._take(self.workspace_bytes)
        if self.biased:
            self._take(CUBLASLT_WORKSPACE_BYTES)

    def _taken_gradients(self) -> list[int]:
        """Gradients that came since they were last asked for, which FSDP2 then has."""
        found, self.gradients = self.gradients, []
        return found

    def _head(
        self,
        hidden: int,
        casts: Sequence[int],
        embeddings: int | None,
        *,
        first: bool,
        later: bool,
        last: bool,
    ) -> int:
        """Final norm and head, forward and backward; returns the gradient of the last hidden state."""
        allocator, norm = self.allocator, self.norm.program
        own = [0] * len(self.norm.units)
        own[0] = hidden
        allocator.play(self.norm.forward, own)
        if embeddings is not None:
            allocator.free(embeddings)
        if self.sharding is not None:
            self.sharding.before_head()
        gradient, kept = self.head.run(
            allocator,
            own[norm.output],
            casts,
            workspace_bytes=self.workspace_bytes if first else 0,
            later=later,
            between=None if self.sharding is None else self.sharding.end_forward,
            reference=partial(self.reference.run, allocator) if self.reference.passes else None,
        )
        self.gradients += kept
        own[norm.incoming] = gradient
        allocator.play(self.norm.backward, own)
        self.gradients += [own[block] for block in norm.gradients]
        if self.sharding is not None:
            self.sharding.after_head(self._taken_gradients(), last=last)
        if norm.outgoing is None:
            raise AssertionError("the final norm's input has no gradient")
        return own[norm.outgoing]

    def _embedding_backward(self, gradient: int, *, later: bool) -> None:
        """The embedding's dense gradient, of `gradient`, which ends; where rows are trained it goes."""
        if self.model.embedding_multiplier:
            scaled = self._take(self.inputs.stream_bytes)
            self.allocator.free(gradient)
            gradient = scaled
        vocab, hidden = self.model.vocab_size, self.model.hidden_size
        block = self._take(vocab * hidden * self.width)
        scratch = embedding_scratch_bytes(self.tokens, vocab, hidden)
        if scratch:
            self.allocator.free(self._take(scratch))
        self.allocator.free(gradient)
        if later or self.model.tied_embeddings or not self.trained.embedding:
            self.allocator.free(block)
        else:
            self.gradients.append(block)
