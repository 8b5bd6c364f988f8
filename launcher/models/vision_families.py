"""Families of vision-language models: where their towers are, and how their processors see images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planner.data.image_rule import FITTED, SQUARE, ImageRule


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type: paths of the tower and of what else sees images, where the tower's layers are, the name
    of the input that tells images' tokens, whether there is always a mask and whether each row has its own
    rotary tables, and how images become patches.
    `written` is what a chat template writes for an image, and what its processor puts in that place: before
    its tokens, each of them, and after. `processor` is the image processor on Pillow: its module and class.
    """

    paths: tuple[str, ...]
    layers: str
    type_ids: str
    masked: bool
    row_tables: bool
    rule: Callable[[Any], ImageRule]
    written: tuple[str, str, str, str]
    processor: tuple[str, str]


def _fitted(config: Any) -> ImageRule:
    """Qwen's, with the pixels of the processor's class (image_processing_pil_qwen2_vl.py); its template puts
    a token before an image and one after it.
    """
    return ImageRule(
        resize=FITTED,
        patch_size=config.vision_config.patch_size,
        merge=config.vision_config.spatial_merge_size,
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 1280,
        around=2,
    )


def _square(config: Any) -> ImageRule:
    """Gemma 3's: every image is image_size pixels a side, with a line break, a start and an end of image and
    a line break around its own tokens (processing_gemma3.py).
    """
    vision, side = config.vision_config, int(config.mm_tokens_per_image**0.5)
    return ImageRule(
        resize=SQUARE,
        patch_size=vision.patch_size,
        merge=vision.image_size // vision.patch_size // side,
        min_pixels=vision.image_size**2,
        max_pixels=vision.image_size**2,
        around=4,
    )


FAMILIES = {
    "qwen2_5_vl": Family(
        paths=("model.visual",),
        layers="model.visual.blocks",
        type_ids="mm_token_type_ids",
        masked=False,
        row_tables=True,
        rule=_fitted,
        written=("<|image_pad|>", "", "<|image_pad|>", ""),
        processor=("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    ),
    "gemma3": Family(
        paths=("model.vision_tower", "model.multi_modal_projector"),
        layers="model.vision_tower.encoder.layers",
        type_ids="token_type_ids",
        masked=True,
        row_tables=False,
        rule=_square,
        # processing_gemma3.py, full_image_sequence
        written=(
            "<start_of_image>",
            "\n\n<start_of_image>",
            "<image_soft_token>",
            "<end_of_image>\n\n",
        ),
        processor=("transformers.models.gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil"),
    ),
}
