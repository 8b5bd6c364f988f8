"""What a micro-step has on the GPU before its layers: embeddings, masks, rotary tables."""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.allocators.native import CachingAllocator
from planner.memory.measured.cuda_terms import CUBLASLT_WORKSPACE_BYTES
from planner.memory.step.images import ImagesReplay, image_pass, input_blocks
from planner.setup.run import TrainingRun


class InputsReplay:
    """The requests of one run's micro-steps up to the first layer."""

    def __init__(self, run: TrainingRun) -> None:
        self.model = run.model
        self.shape = run.micro_step
        self.table_positions = run.table_positions
        self.width = run.storage.width
        self.stream_bytes = self.shape.tokens * run.model.hidden_size * self.shape.stream_width
        self.packing = run.setup.packing
        self.eager = run.attention == "eager"
        self.masks = run.mask_windows
        self.raw_embedding = run.keeps_raw_embedding
        recorded = image_pass(run)
        self.images = None if recorded is None else ImagesReplay(recorded, run)
        self.image_blocks = input_blocks(run)
        self.forward_only: list[int] = []
        """Blocks that are let go of when the model's forward pass ends."""
        self.raw = 1 + self.raw_embedding
        """Where masks and tables begin in what `run` returns."""
        rows = run.trained.token_rows
        self.copy_bytes = run.model.vocab_size * run.model.hidden_size * self.width if rows else 0

    def run(self, allocator: CachingAllocator, *, first: bool = False) -> list[int]:
        """The embeddings' block, then what stays until the micro-step ends: masks, tables, raw embeddings.
        The `first` one finds no workspace for the products of a vision tower.
        """
        take = allocator.allocate
        if self.images is not None:
            if first and not self.model.has_biased_linear:
                take(CUBLASLT_WORKSPACE_BYTES)
            stream, self.forward_only, raw = self.images.run(allocator)
            held = [stream, *raw]
        else:
            held = self._embedded(allocator)
        held += [self._mask(allocator, windowed=window is not None) for window in self.masks]
        table = self.table_positions * self.model.rotary_features
        for _ in range(self.model.rotary_tables):
            # Angles, both halves of them, and cosine and sine in fp32, unscaled and scaled.
            wide = [take(table * FP32 // 2)]
            wide.append(take(table * FP32))
            for _ in range(2):
                turned, scaled = take(table * FP32), take(table * FP32)
                allocator.free(turned)
                wide.append(scaled)
            held += [take(table * self.shape.stream_width) for _ in range(2)]
            for block in wide:
                allocator.free(block)
        return held

    def _embedded(self, allocator: CachingAllocator) -> list[int]:
        """The embeddings' block, and that of unscaled ones where they stay."""
        # The table with the trained rows in it (peft tuners/trainable_tokens/layer.py, get_merged_weights).
        copy = allocator.allocate(self.copy_bytes) if self.copy_bytes else None
        held = [allocator.allocate(self.stream_bytes)]
        if copy is not None:
            allocator.free(copy)
        if self.raw_embedding:
            held.append(allocator.allocate(self.stream_bytes))
        elif self.model.embedding_multiplier:
            scaled = allocator.allocate(self.stream_bytes)
            allocator.free(held[0])
            held[0] = scaled
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
