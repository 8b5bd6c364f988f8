"""What lies on the GPU between steps: weights, adapter, optimizer state, workspaces, tables."""

from __future__ import annotations

from dataclasses import dataclass

from planner.base.units import DTYPE_BYTES
from planner.gpus.spec import GpuSpec
from planner.memory.held.micro_step import has_biased_linear, micro_step
from planner.memory.held.optimizer import OptimizerMemory, optimizer_memory
from planner.memory.held.trainables import Trainables, trainables
from planner.memory.held.weights import WeightMemory, is_quantized, upcast_bytes, weight_memory
from planner.memory.measured.coefficients import Coefficients, cublas_workspace_bytes
from planner.memory.measured.cuda_terms import CUBLASLT_WORKSPACE_BYTES
from planner.models.spec import ModelSpec
from planner.setup.attention import attention_implementation
from planner.setup.training_setup import TrainingSetup

INPUT_BYTES_PER_TOKEN = 3 * 8
"""input_ids, labels and attention_mask as int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """What is on the GPU between steps, in torch's allocator unless said otherwise."""

    weights: WeightMemory
    trained: Trainables
    upcast_bytes: int
    adapter_bytes: int
    optimizer: OptimizerMemory
    cublas_bytes: int
    tables_bytes: int
    largest_dequantized_bytes: int

    @property
    def allocated_bytes(self) -> int:
        """All of it that torch's allocator holds."""
        return (
            self.weights.allocated_bytes
            + self.upcast_bytes
            + self.adapter_bytes
            + self.optimizer.allocated_bytes
            + self.cublas_bytes
            + self.tables_bytes
        )


def resident_memory(
    setup: TrainingSetup,
    model: ModelSpec,
    gpu: GpuSpec | None,
    measured: Coefficients,
    *,
    padded: bool,
    allocator: str,
) -> Resident:
    """What a setup keeps on the GPU between steps."""
    weights = weight_memory(setup, model, allocator)
    trained = trainables(setup, model)
    width = DTYPE_BYTES[setup.dtype]
    layer = model.layers[0]
    shape = micro_step(setup)
    features = layer.rotary_dim or layer.head_dim
    rotary = model.rotary_tables * 2 * shape.positions * features * shape.stream_bytes
    masks = _mask_bytes(setup, model, padded=padded)
    return Resident(
        weights=weights,
        trained=trained,
        upcast_bytes=upcast_bytes(setup, model),
        adapter_bytes=trained.allocated_bytes if setup.uses_lora else 0,
        optimizer=optimizer_memory(setup.optim, trained),
        cublas_bytes=cublas_workspace_bytes(gpu, measured) + _cublaslt_bytes(setup, model),
        tables_bytes=rotary + masks + INPUT_BYTES_PER_TOKEN * setup.tokens_per_micro_step,
        largest_dequantized_bytes=_largest_quantized(model) * width if setup.method == "qlora" else 0,
    )


def _cublaslt_bytes(setup: TrainingSetup, model: ModelSpec) -> int:
    """cuBLASLt's workspaces: the main thread's, and the autograd thread's where that runs layers again."""
    threads = 2 if setup.gradient_checkpointing else 1
    return threads * CUBLASLT_WORKSPACE_BYTES if has_biased_linear(model) else 0


def _mask_bytes(setup: TrainingSetup, model: ModelSpec, *, padded: bool) -> int:
    """Attention masks, one for each kind of layer that needs one: additive for eager, boolean for sdpa.

    sdpa needs none for full sequences that no window cuts (transformers masking_utils.py, sdpa_mask).
    """
    elements = micro_step(setup).scores
    width = DTYPE_BYTES[setup.dtype] if attention_implementation(setup, model) == "eager" else 1
    return len(mask_windows(setup, model, padded=padded)) * elements * width


def mask_windows(setup: TrainingSetup, model: ModelSpec, *, padded: bool) -> tuple[int | None, ...]:
    """Masks by their sliding window (null for none): one for each kind of layer that needs one."""
    kinds = {layer.sliding_window for layer in model.layers}
    windows = sorted(kinds, key=lambda window: (window is not None, window))
    attention = attention_implementation(setup, model)
    if attention == "eager":
        return tuple(windows)
    if attention != "sdpa":
        return ()
    return tuple(w for w in windows if padded or setup.packing or (w is not None and w < setup.max_length))


_LARGEST: dict[tuple[str, int], int] = {}


def _largest_quantized(model: ModelSpec) -> int:
    key = (model.id, model.parameter_count)
    if key not in _LARGEST:
        _LARGEST[key] = max((p.elements for p in model.parameters if is_quantized(p)), default=0)
    return _LARGEST[key]
