"""An optimizer step's requests in order: state at the first step, temporaries at every one."""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.optimizer import LORAFA_COPIES, state_blocks
from planner.memory.step.loading import in_module_order
from planner.setup.run import TrainingRun
from planner.setup.training_knobs import LORAFA

NORM_CHUNK_ELEMENTS = 65_536
"""That a block of a foreach kernel sums (torch native/cuda/MultiTensorApply.cuh, kChunkSize)."""


class OptimizerReplay:
    """One setup's optimizer. transformers gives it biases and norms last (trainer.py, create_optimizer)."""

    def __init__(self, run: TrainingRun) -> None:
        optim, trained = run.setup.optim, run.trained
        if run.parallelism.shards:
            from planner.memory.held.shards import held_trained

            trained = held_trained(trained, run.parallelism)
        ordered = in_module_order(trained.tensors, run.model.num_hidden_layers)
        tensors = sorted(ordered, key=lambda tensor: len(tensor.shape) < 2)
        self.optim = optim
        self.element_width = trained.element_width
        self.elements = [tensor.elements for tensor in tensors]
        self.sizes = [tensor.size_bytes for tensor in tensors]
        self.states = [state_blocks(optim, tensor) for tensor in tensors]

    @property
    def clipping_bytes(self) -> int:
        """fp32 sums of squares of all gradients, as many a tensor as the largest has chunks, of which their
        norm is made to clip them (torch native/cuda/ForeachReduceOp.cu, foreach_tensor_norm_cuda).
        """
        chunks = -(-max(self.elements, default=0) // NORM_CHUNK_ELEMENTS)
        return max(1, len(self.elements) * chunks) * FP32

    @property
    def largest_bytes(self) -> int:
        """The largest block that a step asks for and gives back."""
        own = self.element_width
        width = {"adafactor": FP32, "adamw_torch": own, LORAFA: own}.get(self.optim, 0)
        return width * max(self.elements, default=0)

    def step(self, allocator: CachingAllocator, *, first: bool) -> None:
        """Replay one step."""
        if self.optim == "adafactor":
            self._adafactor(allocator, first=first)
            return
        if first:
            allocator.allocate_all([size for sizes in self.states for size in sizes])
        if self.optim == "adamw_torch":
            # Square roots of every second moment at once (torch optim/adam.py:791).
            allocator.free_all(allocator.allocate_all(self.sizes))
        elif self.optim == LORAFA:
            allocator.free_all(allocator.allocate_all([max(self.sizes)] * LORAFA_COPIES))

    def _adafactor(self, allocator: CachingAllocator, *, first: bool) -> None:
        """Tensor by tensor; a name holds its tensor until it is given another (optimization.py:1257)."""
        take, free = allocator.allocate, allocator.free
        casts = self.element_width < FP32
        gradient = parameter = update = None
        for count, sizes in zip(self.elements, self.states, strict=True):
            wide = count * FP32
            if gradient is not None:
                free(gradient)
            gradient = take(wide) if casts else None
            if first:
                for size in sizes:
                    take(size)
            if parameter is not None:
                free(parameter)
            parameter = take(wide) if casts else None
            square = take(wide)
            shifted = take(wide)
            free(square)
            if update is not None:
                free(update)
            update = take(wide)
            free(shifted)
            free(take(wide))
        for block in (gradient, parameter, update):
            if block is not None:
                free(block)
