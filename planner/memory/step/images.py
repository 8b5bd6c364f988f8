"""Images on the GPU: their pixels, and what lies between token ids and the first decoder layer."""

from __future__ import annotations

from functools import lru_cache

from planner.base.errors import FieldError, InputError, NotModelledError
from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.allocators.native import CachingAllocator
from planner.models.tower import TowerPass
from planner.setup.run import RunKind, TrainingRun

INT64 = 8
SCATTER_WIDTH = INT64 + 1
"""Bytes that CUDA's masked_scatter takes beside its result for an element of it: a running count, and the
mask laid out (torch aten/src/ATen/native/cuda/IndexKernel.cpp, masked_scatter__cuda).
"""


def pixel_bytes(run: TrainingRun) -> int:
    """What the processor makes of a micro-step's images, in fp32 as the data loader hands it over."""
    tower = run.model.tower
    return 0 if tower is None or not run.sees_images else FP32 * tower.patch_floats * run.patches


def input_blocks(run: TrainingRun) -> list[int]:
    """What images add to the inputs of an optimizer step, whose micro-batches are all there from its start
    (transformers trainer.py, get_batch_samples): of each its pixels, and which tokens are images'.
    """
    if not run.sees_images:
        return []
    return [pixel_bytes(run), INT64 * run.micro_step.tokens] * run.setup.gradient_accumulation_steps


def input_bytes(run: TrainingRun) -> int:
    """All of them."""
    return sum(input_blocks(run))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMemory:
    """Bytes beside what is there between steps: the most while images become embeddings, and what of it stays
    until the language model's forward pass ends.
    """

    peak_bytes: int
    held_bytes: int


NO_IMAGES = ImageMemory(peak_bytes=0, held_bytes=0)


def image_pass(run: TrainingRun) -> TowerPass | None:
    """What was recorded for a run's micro-steps; None where it has no images."""
    tower, storage = run.model.tower, run.storage
    if tower is None or not run.sees_images:
        return None
    return tower.pass_of(storage.width, quantized=storage.quantized and storage.tower)


def image_memory(run: TrainingRun) -> ImageMemory:
    """The peak and what stays, by live bytes."""
    recorded = image_pass(run)
    if recorded is None:
        return NO_IMAGES
    tokens, patches = run.micro_step.tokens, run.patches
    kept = recorded.embedding if run.keeps_raw_embedding else None
    return _live(recorded, tokens, patches, run.model.hidden_size, kept)


@lru_cache(maxsize=4096)
def _live(recorded: TowerPass, tokens: int, patches: int, hidden: int, kept: int | None) -> ImageMemory:
    sizes = [size.at(tokens, patches) for size in recorded.sizes]
    live = peak = 0
    for event in recorded.events:
        if event >= 0:
            live += sizes[event]
            scratch = SCATTER_WIDTH * tokens * hidden if event == recorded.stream else 0
            peak = max(peak, live + scratch)
        elif -1 - event != kept:
            live -= sizes[-1 - event]
    return ImageMemory(peak_bytes=peak, held_bytes=sum(sizes[number] for number in recorded.held))


class ImagesReplay:
    """The requests of a micro-step's images."""

    def __init__(self, recorded: TowerPass, run: TrainingRun) -> None:
        self.recorded = recorded
        self.sizes = [size.at(run.micro_step.tokens, run.patches) for size in recorded.sizes]
        self.scatter = SCATTER_WIDTH * run.micro_step.tokens * run.model.hidden_size
        self.keeps_raw = run.keeps_raw_embedding

    def run(self, allocator: CachingAllocator) -> tuple[int, list[int], list[int]]:
        """The block of the states that the language model is given; what stays until its forward pass ends;
        and what stays until the micro-step does.
        """
        recorded, blocks = self.recorded, [0] * len(self.sizes)
        for event in recorded.events:
            if event < 0:
                number = -1 - event
                if not (self.keeps_raw and number == recorded.embedding):
                    allocator.free(blocks[number])
                continue
            blocks[event] = allocator.allocate(self.sizes[event])
            if event == recorded.stream:
                laid_out = allocator.allocate(self.scatter // SCATTER_WIDTH * INT64)
                mask = allocator.allocate(self.scatter // SCATTER_WIDTH)
                allocator.free_all([laid_out, mask])
        raw = [blocks[recorded.embedding]] if self.keeps_raw else []
        return blocks[recorded.stream], [blocks[number] for number in recorded.held], raw


_BESIDE_A_TOWER: tuple[tuple[str, object], ...] = (
    ("compile", "none"),
    ("kernels", "none"),
    ("packing", False),
    ("prepare_for_kbit_training", False),
    ("load_in_8bit", False),
    ("activation_offloading", False),
    ("base_matmul", "bf16"),
    ("distributed", None),
    ("task", "sft"),
    ("bias", "none"),
    ("modules_to_save", None),
    ("trainable_token_indices", None),
    ("task", "sft"),
)
"""What is counted, and was tried, beside a vision tower."""


def refuse_beside_tower(run: RunKind) -> None:
    """Refuse images without a tower to look at them, and what was not tried beside one.

    Raises:
        InputError: images of a model of text, or a tower that would be trained.
        NotModelledError: a knob that is not counted with a tower.
    """
    setup, model = run.setup, run.model
    if model.tower is None:
        name, value = next(
            (name, getattr(setup, name))
            for name, plain_value in (("image_patches", 0), ("vision_tower", "16bit"))
            if getattr(setup, name) != plain_value
        )
        raise FieldError(name, value, f"none for {model.id}, which is described as a model of text alone")
    if setup.method == "full":
        raise InputError(f"method full would train the vision tower of {model.id}; use qlora or lora")
    if run.attention != "sdpa":
        raise NotModelledError("attn_implementation beside a vision tower", run.attention)
    for name, counted in _BESIDE_A_TOWER:
        if getattr(setup, name) != counted:
            raise NotModelledError(f"{name} beside a vision tower", getattr(setup, name))
