"""Optimizer: state by tensor, where it lives, and what a step needs for a moment.

Sources: torch optim/adam.py, sgd.py; transformers optimization.py (Adafactor) and trainer.py (32-bit state of
embeddings); bitsandbytes optim/optimizer.py (8-bit from 4,096 elements, paging from 1e5).
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.allocators.native import rounded
from planner.setup.trained import Trained, TrainedTensor
from planner.setup.training_knobs import LORAFA

MIN_8BIT_ELEMENTS = 4096
MIN_PAGED_ELEMENTS = 100_000
OPTIMIZER_BLOCK = 256
QUANTIZATION_MAP_BYTES = 256 * 4
FUSED_STEP_BYTES = 4
LORAFA_COPIES = 4
"""Of a tensor at work, in PEFT's LoRA-FA (optimizers/lorafa.py, step): names hold the projected gradient and
the root of the second moment until the next tensor's are there, which come by a product and its scaling.
"""
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


def trained_bytes(trained: Trained) -> int:
    """What trained tensors take from the allocator, each rounded to its block."""
    return _rounded_bytes(trained.tensors)


def held_bytes(trained: Trained) -> int:
    """What trained tensors and an adapter's frozen ones take from it."""
    return _rounded_bytes(trained.held)


def _rounded_bytes(tensors: tuple[TrainedTensor, ...]) -> int:
    return sum(rounded(tensor.size_bytes) * tensor.count for tensor in tensors)


def optimizer_memory(optim: str, trained: Trained) -> OptimizerMemory:
    """Memory of the named optimizer for what a setup trains."""
    allocated = sum(sum(map(rounded, state_blocks(optim, t))) * t.count for t in trained.tensors)
    managed = sum(managed_bytes(optim, t) * t.count for t in trained.tensors)
    if "8bit" in optim:
        allocated += MOMENTS[optim] * QUANTIZATION_MAP_BYTES
    return OptimizerMemory(
        allocated_bytes=allocated, managed_bytes=managed, temporary_bytes=_temporary_bytes(optim, trained)
    )


def state_blocks(optim: str, tensor: TrainedTensor) -> tuple[int, ...]:
    """Bytes of the blocks of one tensor's state in torch's allocator, in the order of their birth."""
    if optim == "sgd":
        return ()
    if optim == "adafactor":
        return _factored(tensor)
    if optim not in MOMENTS:
        state = tensor.size_bytes
        # The fused implementation counts its steps on the GPU.
        return (FUSED_STEP_BYTES, state, state) if optim == "adamw_torch_fused" else (state, state)
    moments, narrow = MOMENTS[optim], _is_narrow(optim, tensor)
    blocks = [] if _is_paged(optim, tensor) else moments * [tensor.elements * (1 if narrow else FP32)]
    if narrow:
        blocks += moments * [-(-tensor.elements // OPTIMIZER_BLOCK) * FP32]
    return tuple(blocks)


def saved_state(optim: str, trained: Trained) -> tuple[int, int]:
    """Bytes of the state as a checkpoint holds it, unrounded, and how many tensors hold them."""
    size, count = 0, 0
    for tensor in trained.tensors:
        blocks = state_blocks(optim, tensor)
        managed = managed_bytes(optim, tensor)
        size += (sum(blocks) + managed) * tensor.count
        count += (len(blocks) + (MOMENTS[optim] if managed else 0)) * tensor.count
    if "8bit" in optim:
        # Each tensor names the maps, which are stored once.
        size += MOMENTS[optim] * QUANTIZATION_MAP_BYTES
    return size, count


def managed_bytes(optim: str, tensor: TrainedTensor) -> int:
    """Bytes of CUDA managed memory that one tensor's state takes."""
    if not _is_paged(optim, tensor):
        return 0
    return MOMENTS[optim] * tensor.elements * (1 if _is_narrow(optim, tensor) else FP32)


def _is_narrow(optim: str, tensor: TrainedTensor) -> bool:
    return "8bit" in optim and tensor.elements >= MIN_8BIT_ELEMENTS and not tensor.is_embedding


def _is_paged(optim: str, tensor: TrainedTensor) -> bool:
    return optim.startswith("paged") and tensor.elements >= MIN_PAGED_ELEMENTS


def _temporary_bytes(optim: str, trained: Trained) -> int:
    if optim == "adamw_torch":
        # The unfused implementation takes the square root of every second moment at once (adam.py:791).
        return trained_bytes(trained)
    if optim == LORAFA:
        return LORAFA_COPIES * max((t.size_bytes for t in trained.tensors), default=0)
    if optim == "adafactor":
        # Gradient and parameter in fp32 (when held in 16 bits), the update, and one product of its making.
        copies = 4 if trained.element_width < FP32 else 2
        return copies * FP32 * max((t.elements for t in trained.tensors), default=0)
    return 0


def _factored(tensor: TrainedTensor) -> tuple[int, ...]:
    """Row and column moments (the whole second moment of a vector), and one value: the parameter's RMS."""
    if len(tensor.shape) < 2:
        return (tensor.elements * FP32, FP32)
    rows = tensor.elements // tensor.shape[-1]
    columns = tensor.elements // tensor.shape[-2]
    return (rows * FP32, columns * FP32, FP32)
