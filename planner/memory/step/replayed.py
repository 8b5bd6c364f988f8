"""What a replay of whole steps is told of the card, and what it says."""

from __future__ import annotations

from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.memory.measured.cuda_terms import tuning_buffer_bytes, workspace_block_bytes

ADAPTER_STEPS = 2
FULL_STEPS = 3
"""Steps until reserved memory stays: optimizer state is born in the first and moves the blocks of the second;
where all weights are trained, its gradients' holes settle in the third, and so do the blocks of whole layers
where none is checkpointed."""


class OverRoomError(Exception):
    """A replay that was asked for no more than this has reserved more than there is room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedMemory:
    """What the allocator has handed out at most (unsplit tails included) and reserved, by phase, in bytes.

    The step's are those of steady state. `largest_block_bytes` is the largest block that a step asks for:
    where blocks come to lie otherwise than replayed, one of that size more or less is reserved.
    """

    load_allocated_bytes: int
    load_reserved_bytes: int
    step_allocated_bytes: int
    step_reserved_bytes: int
    largest_block_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaSizes:
    """What a GPU decides of a replay: cuBLAS' workspace of one handle, and the buffer in which inductor times
    a new kernel.
    """

    workspace_bytes: int
    tuning_bytes: int

    @classmethod
    def of(cls, gpu: GpuSpec | None) -> CudaSizes:
        """A GPU's sizes (null: of one that is not known)."""
        return cls(workspace_bytes=workspace_block_bytes(gpu), tuning_bytes=tuning_buffer_bytes(gpu))
