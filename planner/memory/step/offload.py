"""Activation offloading in the allocator's replay: what leaves the GPU in forward, and comes back.

TRL copies a saved tensor to the host, holds the last few until their copies are done, and brings each back
into the pool of a stream of its own (trl/models/activation_offloading.py, OffloadActivations).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from planner.memory.allocators.native import MIN_BLOCK, CachingAllocator
from planner.memory.decoder.program import Program
from planner.memory.decoder.programs import SizedProgram
from planner.setup.run import TrainingRun

FETCHED_AT_ONCE = 3
"""Saved tensors that are back on the GPU at the same time (trace llama_off_nock)."""
WAITING = 5
"""Checkpoints' inputs whose memory waits for the GPU beside the two that it works on, with Liger's kernels:
their norm saves a view of the input, so TRL hands it to record_stream (activation_offloading.py:500-501), and
the host runs ahead by as many layers as fill the GPU's queue. 5 in Llama and Qwen 3, 3 in Gemma 3
(20261122-96ee85ceb8ff, 20261122-772f3a48686c, 20261122-a9555c5a664b, 20261122-be0f508d32ce); none where the
GPU waits for the host.
"""


class OffloadReplay:
    """Which blocks of a setup's micro-steps are on the GPU; those that come back have their own allocator.

    `input_bytes` is the size of a layer's input, `norm_bytes` of what the final norm saves; `waits` says that
    inputs that came back stay in their stream's pool until the GPU is through with them, `stash` how many
    tensors on their way to the host the stack holds. What was brought
    back for a node is let go after the next one.
    """

    def __init__(
        self, allocator: CachingAllocator, *, input_bytes: int, norm_bytes: int, waits: bool, stash: int
    ) -> None:
        self.compute = allocator
        self.stream = type(allocator)()
        self.input_bytes, self.norm_bytes = input_bytes, norm_bytes
        self._waiting = WAITING if waits else 0
        self._stash_size = stash
        self.peak_bytes = 0
        self._previous: list[int] = []
        self._stash: deque[int] = deque()

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the pool that saved tensors come back to."""
        return self.stream.reserved_bytes + self._waiting * self.input_bytes

    def reset_peak(self) -> None:
        """Begin a step: forget the peak so far."""
        self.peak_bytes = 0
        self.compute.reset_peak()
        self.stream.reset_peak()

    def mark(self) -> None:
        """Take into the peak what both pools handed out since the last mark: they peak at other times."""
        together = self.compute.peak_allocated_bytes + self.stream.peak_allocated_bytes
        self.peak_bytes = max(self.peak_bytes, together)
        self.compute.reset_peak()
        self.stream.reset_peak()

    def keep(self, blocks: Sequence[int]) -> None:
        """Blocks that forward leaves: the earliest beyond the stash are let go."""
        self._stash.extend(blocks)
        while len(self._stash) > self._stash_size - 1:
            self.compute.free(self._stash.popleft())

    def end_forward(self) -> None:
        """Let go of the stash: the output head's own tensors take their place in it."""
        while self._stash:
            self.compute.free(self._stash.popleft())
        self._previous = [self.stream.allocate(self.norm_bytes)]

    def end_backward(self) -> None:
        """Let go of what came back last."""
        for block in self._previous:
            self.stream.free(block)
        self._previous = []

    def run_backward(self, sized: SizedProgram, own: list[int]) -> None:
        """Run a layer's backward pass, with what it reads brought back."""
        program = sized.program
        recomputing, rest = sized.fetched_backward
        self._fetch(sized, own)
        self.compute.play(recomputing, own)
        if program.recomputed:
            # The layer's first node has run, which recomputed it: TRL lets go of what it brought back before.
            self.mark()
            self.end_backward()
            self.stream.reset_peak()
        self.compute.play(rest, own)
        if program.keeps_input_alone:
            self.end_backward()
            self._previous = [own[0]]
        self.mark()

    def _fetch(self, sized: SizedProgram, own: list[int]) -> None:
        """Bring back what a layer's backward reads."""
        if sized.program.keeps_input_alone:
            own[0] = self.stream.allocate(self.input_bytes)
            return
        # One after the other: what the node at work and the two before it read is there at a time.
        largest = sized.kept_by_size[-FETCHED_AT_ONCE:]
        for block in largest:
            own[block] = self.stream.allocate(sized.units[block] * MIN_BLOCK)
        self.end_backward()
        self._previous = [own[block] for block in largest]

    @staticmethod
    def blocks_of(program: Program) -> tuple[int, ...]:
        """Blocks of a layer that leave the GPU: its checkpoint, or what one node alone has saved."""
        return (0,) if program.keeps_input_alone else program.kept_once


def offload_replay(
    run: TrainingRun, allocator: CachingAllocator, input_bytes: int, norm_bytes: int
) -> OffloadReplay | None:
    """A run's; none where it offloads nothing."""
    if not run.setup.activation_offloading:
        return None
    return OffloadReplay(
        allocator,
        input_bytes=input_bytes,
        norm_bytes=norm_bytes,
        waits=run.setup.kernels == "liger",
        stash=run.stack.offload_stash,
    )
