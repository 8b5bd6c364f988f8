"""What lies on the GPU between steps: weights, adapter, optimizer state, workspaces, tables."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.memory.held.optimizer import OptimizerMemory, held_bytes, optimizer_memory, trained_bytes
from planner.memory.held.weights import (
    WeightMemory,
    largest_quantized_bytes,
    loaded_weights,
    scales_bytes,
    upcast_bytes,
)
from planner.memory.measured.coefficients import Coefficients, cublas_workspace_bytes
from planner.memory.measured.cuda_terms import CUBLASLT_WORKSPACE_BYTES
from planner.memory.step.images import input_bytes
from planner.models.spec import ModelSpec
from planner.setup.adapters import Adapter
from planner.setup.run import RunKind, TrainingRun
from planner.setup.trained import Trained, trained_tensors

INPUT_BYTES_PER_TOKEN = 3 * 8
"""input_ids, labels and attention_mask as int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """What is on the GPU between steps, in torch's allocator unless said otherwise.

    `buckets_bytes` are those that DDP averages gradients in: as much as the gradients, and there to the end
    (torch nn/parallel/distributed.py; gradient_as_bucket_view is false). `trained` is this GPU's share.
    `reference_bytes` is a second model, which a task compares with where no adapter can be disabled.
    """

    weights: WeightMemory
    trained: Trained
    upcast_bytes: int
    adapter_bytes: int
    optimizer: OptimizerMemory
    cublas_bytes: int
    tables_bytes: int
    largest_dequantized_bytes: int
    buckets_bytes: int = 0
    reference_bytes: int = 0

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
            + self.buckets_bytes
            + self.reference_bytes
        )


def resident_memory(
    run: TrainingRun, gpu: GpuSpec | None, measured: Coefficients, *, allocator: str
) -> Resident:
    """What a run keeps on the GPU between steps."""
    shape = run.micro_step
    features = run.model.rotary_features
    rotary = run.model.rotary_tables * 2 * run.table_positions * features * shape.stream_width
    held = _held(run.kind, allocator)
    return Resident(
        weights=held.weights,
        trained=held.trained,
        upcast_bytes=held.upcast_bytes,
        adapter_bytes=held.adapter_bytes,
        optimizer=held.optimizer,
        cublas_bytes=cublas_workspace_bytes(gpu, measured) + held.cublaslt_bytes,
        tables_bytes=sum(scales_bytes(run.kind))
        + rotary
        + mask_bytes(run)
        + INPUT_BYTES_PER_TOKEN * shape.tokens
        + input_bytes(run),
        largest_dequantized_bytes=held.largest_dequantized_bytes,
        buckets_bytes=held.trained.size_bytes if run.parallelism.replicates else 0,
        reference_bytes=held.weights.allocated_bytes if run.kind.holds_reference else 0,
    )


class _Held(NamedTuple):
    """What is resident whatever the sizes of a run."""

    weights: WeightMemory
    trained: Trained
    adapter_bytes: int
    optimizer: OptimizerMemory
    upcast_bytes: int
    cublaslt_bytes: int
    largest_dequantized_bytes: int


@lru_cache(maxsize=8192)
def _held(run: RunKind, allocator: str) -> _Held:
    trained, adapter_bytes, optimizer = _trained(run)
    return _Held(
        weights=_weights(run, allocator),
        trained=trained,
        adapter_bytes=adapter_bytes,
        optimizer=optimizer,
        upcast_bytes=upcast_bytes(run),
        cublaslt_bytes=_cublaslt_bytes(run),
        largest_dequantized_bytes=largest_quantized_bytes(run.model, run.storage),
    )


def _weights(run: RunKind, allocator: str) -> WeightMemory:
    if run.parallelism.shards:
        from planner.memory.held.sharded_weights import sharded_weights

        return sharded_weights(run, allocator).memory
    return loaded_weights(run.model, run.storage, allocator).memory


def _trained(run: RunKind) -> tuple[Trained, int, OptimizerMemory]:
    """What this GPU trains, the adapter's bytes (0 where all weights are trained), the optimizer's memory."""
    if not run.parallelism.shards:
        return run.trained, *_of_training(run.model, run.adapter, run.storage.width, run.setup.optim)
    from planner.memory.held.shards import held_trained

    held = held_trained(run.trained, run.parallelism)
    adapter_bytes = 0 if run.adapter is None else trained_bytes(held)
    return held, adapter_bytes, optimizer_memory(run.setup.optim, held)


@lru_cache(maxsize=1024)
def _of_training(
    model: ModelSpec, adapter: Adapter | None, width: int, optim: str
) -> tuple[int, OptimizerMemory]:
    """The adapter's bytes (none where all weights are trained), and the optimizer's memory."""
    trained = trained_tensors(model, adapter, width)
    return 0 if adapter is None else held_bytes(trained), optimizer_memory(optim, trained)


def _cublaslt_bytes(run: RunKind) -> int:
    """cuBLASLt's workspaces: the main thread's, and the autograd thread's where that runs layers again."""
    threads = 2 if run.setup.gradient_checkpointing else 1
    if not run.model.has_biased_linear:
        # A vision tower's are biased, and run in the main thread alone.
        threads = 1 if run.sees_images else 0
    return threads * CUBLASLT_WORKSPACE_BYTES


def mask_bytes(run: TrainingRun) -> int:
    """Attention masks, one for each kind of layer that needs one: additive for eager, boolean for sdpa."""
    width = run.storage.width if run.attention == "eager" else 1
    return len(run.mask_windows) * run.micro_step.scores * width
