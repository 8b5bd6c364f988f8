"""Tower: the part of a vision-language model that looks at images, kept frozen.

What it makes of an image is a number of patches and of tokens, by the image processor's own arithmetic; what
it holds while it does so was recorded from transformers' own code (launcher/models/vision.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.lazy import cached_fact
from planner.base.values import dataclass
from planner.models.parameter import Parameter

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
    square. `around` are tokens that the processor puts before and after an image's own.
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


class PassBytes(NamedTuple):
    """Bytes of a buffer: once, for each token of the sequences, and for each patch of their images."""

    once: float
    per_token: float
    per_patch: float

    def at(self, tokens: int, patches: int) -> int:
        """In a micro-step of that many."""
        return round(self.once + self.per_token * tokens + self.per_patch * patches)


@dataclass(frozen=True, kw_only=True)
class TowerPass:
    """What lies between token ids with pixels and the first decoder layer, as recorded: `sizes` of its
    buffers, and `events` in order, a buffer's number where it is made and -1 less it where it is freed.

    `embedding` is the buffer of the tokens' own embeddings, `stream` that of the states which the language
    model is given. What is not freed by then is held until its forward pass ends. The pass is that of runs
    that compute in elements of `width` bytes, with the tower's linear layers `quantized` or not.
    """

    width: int
    quantized: bool
    sizes: tuple[PassBytes, ...]
    events: tuple[int, ...]
    embedding: int
    stream: int

    def __post_init__(self) -> None:
        validate.integer("tower width", self.width, minimum=1, maximum=8)
        validate.boolean("tower quantized", self.quantized)
        for name in ("embedding", "stream"):
            validate.integer(f"tower {name}", getattr(self, name), minimum=0, maximum=len(self.sizes) - 1)

    @cached_fact
    def held(self) -> tuple[int, ...]:
        """Buffers beside embeddings and stream that are there while the language model's forward pass runs."""
        there = dict.fromkeys(event for event in self.events if event >= 0)
        for event in self.events:
            if event < 0:
                del there[-1 - event]
        return tuple(number for number in there if number not in (self.embedding, self.stream))


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower with its projector.

    `paths` are its modules' in the model, `parameters` theirs (`*` where the index of a layer stands).
    `patch_floats` are the numbers that the processor makes of a patch, in fp32; `type_ids` says what the
    model calls the input that tells images' tokens, `masked` that its language model gets a mask wherever
    there are images. `depth` layers of `hidden_size` attend over whole images in `full_layers` of them, else
    within windows.
    """

    paths: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    rule: ImageRule
    patch_floats: int
    type_ids: str
    masked: bool
    hidden_size: int
    depth: int
    full_layers: int
    passes: tuple[TowerPass, ...]

    def __post_init__(self) -> None:
        for path in self.paths:
            validate.text("tower path", path)
        validate.integer("patch_floats", self.patch_floats, minimum=1, maximum=2**24)
        validate.integer("tower depth", self.depth, minimum=1, maximum=1024)
        validate.integer("tower full_layers", self.full_layers, minimum=0, maximum=self.depth)

    @cached_fact
    def parameter_count(self) -> int:
        """All its parameters."""
        return sum(one.elements * one.count for one in self.parameters)

    @cached_fact
    def linear_weights(self) -> int:
        """Elements of its linear layers' weights: two operations each for a patch, or for a token of merged
        ones, which are taken for patches.
        """
        return sum(p.elements * p.count for p in self.parameters if p.module_class == "Linear" and p.kind == "weight")

    def pass_of(self, width: int, *, quantized: bool) -> TowerPass:
        """The pass that was recorded for such runs.

        Raises:
            InputError: none was.
        """
        for one in self.passes:
            if (one.width, one.quantized) == (width, quantized):
                return one
        raise InputError(f"the vision tower was not recorded in elements of {width} bytes")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tower:
        """Read the JSON form, that of dataclasses.asdict."""
        own = {
            "paths": tuple(values["paths"]),
            "parameters": tuple(Parameter.from_dict(one) for one in values["parameters"]),
            "rule": ImageRule(**values["rule"]),
            "passes": tuple(_pass(one) for one in values["passes"]),
        }
        return cls(**{**values, **own})


def _pass(values: Mapping[str, Any]) -> TowerPass:
    sizes = tuple(PassBytes(*one) for one in values["sizes"])
    return TowerPass(**{**values, "sizes": sizes, "events": tuple(values["events"])})
