"""What a micro-step has on the GPU before its layers: embeddings, masks, rotary tables."""

from __future__ import annotations

from planner.base.units import DTYPE_BYTES, FP32
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.micro_step import keeps_raw_embedding, micro_step
from planner.memory.step.resident import mask_windows
from planner.models.spec import ModelSpec
from planner.setup.attention import attention_implementation
from planner.setup.training_setup import TrainingSetup


class InputsReplay:
    """The requests of one setup's micro-steps up to the first layer."""

    def __init__(self, setup: TrainingSetup, model: ModelSpec, *, padded: bool) -> None:
        self.model = model
        self.shape = micro_step(setup)
        self.width = DTYPE_BYTES[setup.dtype]
        self.stream_bytes = self.shape.tokens * model.hidden_size * self.shape.stream_bytes
        self.packing = setup.packing
        self.eager = attention_implementation(setup, model) == "eager"
        self.masks = mask_windows(setup, model, padded=padded)
        self.raw_embedding = keeps_raw_embedding(setup, model)

    def run(self, allocator: CachingAllocator) -> list[int]:
        """The embeddings' block, then what stays until the micro-step ends: masks, tables, raw embeddings."""
        take = allocator.allocate
        held = [take(self.stream_bytes)]
        if self.raw_embedding:
            held.append(take(self.stream_bytes))
        elif self.model.embedding_multiplier:
            scaled = take(self.stream_bytes)
            allocator.free(held[0])
            held[0] = scaled
        held += [self._mask(allocator, windowed=window is not None) for window in self.masks]
        layer = self.model.layers[0]
        table = self.shape.positions * (layer.rotary_dim or layer.head_dim)
        for _ in range(self.model.rotary_tables):
            # Angles, both halves of them, and cosine and sine in fp32, unscaled and scaled.
            wide = [take(table * FP32 // 2)]
            wide.append(take(table * FP32))
            for _ in range(2):
                turned, scaled = take(table * FP32), take(table * FP32)
                allocator.free(turned)
                wide.append(scaled)
            held += [take(table * self.shape.stream_bytes) for _ in range(2)]
            for block in wide:
                allocator.free(block)
        return held

    def _mask(self, allocator: CachingAllocator, *, windowed: bool) -> int:
        """One attention mask (transformers masking_utils.py): conditions of all positions, and-ed one after
        the other, then with the padding of each row; for eager attention made additive.
        """
        take, free = allocator.allocate, allocator.free
        square = self.shape.positions**2
        # Of packed rows "the same example" comes first, and nothing is spread: they are one row.
        packed = self._and(allocator, None, take(square)) if self.packing else None
        condition = take(square)
        if windowed:
            window = self._and(allocator, None, condition)
            condition = self._and(allocator, window, take(square))
        if packed is not None:
            mask = self._and(allocator, packed, condition)
        else:
            combined = self._and(allocator, None, condition)
            mask = take(self.shape.scores)
            free(combined)
        if self.eager:
            additive = take(self.shape.scores * self.width)
            free(mask)
            mask = additive
        return mask

    def _and(self, allocator: CachingAllocator, result: int | None, condition: int) -> int:
        """The next result of and_masks: a new square, then condition and last result go (first a scalar)."""
        combined = allocator.allocate(self.shape.positions**2)
        allocator.free(condition)
        if result is not None:
            allocator.free(result)
        return combined
