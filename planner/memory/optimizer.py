"""Optimizer: state by tensor, where it lives, and what a step needs for a moment.

Sources: torch optim/adam.py, sgd.py; transformers optimization.py (Adafactor) and trainer.py (32-bit state of
embeddings); bitsandbytes optim/optimizer.py (8-bit from 4,096 elements, paging from 1e5).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.adapter import Trainables, TrainableTensor
from planner.memory.allocator import rounded

MIN_8BIT_ELEMENTS = 4096
MIN_PAGED_ELEMENTS = 100_000
OPTIMIZER_BLOCK = 256
QUANTIZATION_MAP_BYTES = 256 * 4
MOMENTS = {
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
}
"""State tensors a parameter has, for bitsandbytes' optimizers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerMemory:
    """Bytes of optimizer state in torch's allocator and in CUDA managed memory, and a step's temporaries."""

    allocated_bytes: int
    managed_bytes: int
    temporary_bytes: int


def optimizer_memory(optim: str, trained: Trainables) -> OptimizerMemory:
    """Memory of the named optimizer for what a setup trains."""
    if optim in MOMENTS:
        return _bitsandbytes(optim, trained)
    width = trained.element_bytes
    if optim == "sgd":
        return OptimizerMemory(allocated_bytes=0, managed_bytes=0, temporary_bytes=0)
    if optim == "adafactor":
        return _adafactor(trained)
    steps = 512 if optim == "adamw_torch_fused" else 0
    state = sum((2 * rounded(t.elements * width) + steps) * t.count for t in trained.tensors)
    # The unfused implementation takes the square root of every second moment at once (adam.py:791).
    temporary = trained.allocated_bytes if optim == "adamw_torch" else 0
    return OptimizerMemory(allocated_bytes=state, managed_bytes=0, temporary_bytes=temporary)


def _bitsandbytes(optim: str, trained: Trainables) -> OptimizerMemory:
    moments = MOMENTS[optim]
    paged = optim.startswith("paged")
    allocated = managed = 0
    for tensor in trained.tensors:
        narrow = "8bit" in optim and tensor.elements >= MIN_8BIT_ELEMENTS and not tensor.is_embedding
        state = tensor.elements * (1 if narrow else 4)
        if paged and tensor.elements >= MIN_PAGED_ELEMENTS:
            managed += moments * state * tensor.count
        else:
            allocated += moments * rounded(state) * tensor.count
        if narrow:
            allocated += moments * rounded(-(-tensor.elements // OPTIMIZER_BLOCK) * 4) * tensor.count
    if "8bit" in optim:
        allocated += moments * QUANTIZATION_MAP_BYTES
    return OptimizerMemory(allocated_bytes=allocated, managed_bytes=managed, temporary_bytes=0)


def _adafactor(trained: Trainables) -> OptimizerMemory:
    state = sum(_factored_bytes(tensor) * tensor.count for tensor in trained.tensors)
    largest = max((t.elements for t in trained.tensors), default=0)
    # Gradient and parameter in fp32 (when held in 16 bits), the update, and one product of its making.
    copies = 4 if trained.element_bytes < 4 else 2
    return OptimizerMemory(allocated_bytes=state, managed_bytes=0, temporary_bytes=copies * 4 * largest)


def _factored_bytes(tensor: TrainableTensor) -> int:
    """Row and column moments (the whole second moment of a vector), and one value: the parameter's RMS."""
    if len(tensor.shape) < 2:
        return rounded(tensor.elements * 4) + rounded(4)
    rows = tensor.elements // tensor.shape[-1]
    columns = tensor.elements // tensor.shape[-2]
    return rounded(rows * 4) + rounded(columns * 4) + rounded(4)
