"""ImageRule: the patches and tokens that a model's image processor makes of an image."""

from __future__ import annotations

import math
from typing import NamedTuple

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass

FITTED, SQUARE = "fitted", "square"
RESIZES = (FITTED, SQUARE)
MAX_ASPECT = 200
"""Sides of an image, one to the other, beyond which Qwen's processor refuses it (transformers
models/qwen2_vl/image_processing_pil_qwen2_vl.py, smart_resize)."""


class ImageSize(NamedTuple):
    """An image's pixels, as it is shown: turned by its orientation tag."""

    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRule:
    """How a processor resizes an image and divides it into patches of `patch_size` pixels a side, of which
    `merge` x `merge` become one token.

    `resize` "fitted" keeps its proportions: sides become multiples of patch_size x merge, and the whole lies
    between `min_pixels` and `max_pixels`. "square" makes every image `min_pixels` = `max_pixels` pixels, a
    square. `around` are the tokens that stand before and after an image's own in a chat.
    """

    resize: str
    patch_size: int
    merge: int
    min_pixels: int
    max_pixels: int
    around: int

    def __post_init__(self) -> None:
        validate.choice("image resize", self.resize, RESIZES)
        for name, most in (("patch_size", 2**12), ("merge", 2**6)):
            validate.integer(f"image {name}", getattr(self, name), minimum=1, maximum=most)
        validate.integer("image min_pixels", self.min_pixels, minimum=1, maximum=2**40)
        validate.integer("image max_pixels", self.max_pixels, minimum=self.min_pixels, maximum=2**40)
        validate.integer("image around", self.around, minimum=0, maximum=2**10)
        side = math.isqrt(self.max_pixels)
        if self.resize == SQUARE and (side**2 != self.max_pixels or side % (self.patch_size * self.merge)):
            raise FieldError("image max_pixels", self.max_pixels, "a square of whole tokens")

    def grid(self, size: ImageSize) -> tuple[int, int]:
        """Rows and columns of an image's patches.

        Raises:
            InputError: the processor refuses an image of such proportions.
        """
        if self.resize == SQUARE:
            side = math.isqrt(self.max_pixels) // self.patch_size
            return side, side
        height, width = self._fitted(size)
        return height // self.patch_size, width // self.patch_size

    def patches(self, size: ImageSize) -> int:
        """Patches of an image, which the tower sees."""
        rows, columns = self.grid(size)
        return rows * columns

    @property
    def most_patches(self) -> int:
        """Patches of the largest image."""
        return self.max_pixels // self.patch_size**2

    def tokens(self, patches: int) -> int:
        """Tokens that so many patches become."""
        return patches // self.merge**2

    def _fitted(self, size: ImageSize) -> tuple[int, int]:
        """Height and width after smart_resize (the place at MAX_ASPECT), with Python's own rounding."""
        height, width, factor = size.height, size.width, self.patch_size * self.merge
        if max(height, width) / min(height, width) > MAX_ASPECT:
            raise InputError(
                f"an image of {width} x {height} pixels: the processor takes none that is more than "
                f"{MAX_ASPECT} times as long as wide"
            )
        tall, wide = round(height / factor) * factor, round(width / factor) * factor
        if tall * wide > self.max_pixels:
            beta = math.sqrt((height * width) / self.max_pixels)
            tall = max(factor, math.floor(height / beta / factor) * factor)
            wide = max(factor, math.floor(width / beta / factor) * factor)
        elif tall * wide < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            tall = math.ceil(height * beta / factor) * factor
            wide = math.ceil(width * beta / factor) * factor
        return tall, wide
