"""Tower: the part of a vision-language model that looks at images, kept frozen.

What it makes of an image is a number of patches and of tokens, by the image processor's own arithmetic; what
it holds while it does so was recorded from transformers' own code (launcher/models/vision.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from planner.base import validate
from planner.base.errors import InputError
from planner.base.lazy import cached_fact
from planner.base.values import dataclass
from planner.data.image_rule import SQUARE, ImageRule
from planner.models.parameter import Parameter

WINDOW = 64
"""Patches of a window of Qwen2.5-VL's attention: 112 pixels a side (config.json, window_size)."""


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
        """Buffers beside embeddings and stream that stay until the language model's forward pass ends."""
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
    there are images, `row_tables` that each row has rotary tables of its own (places in an image are two).
    `depth` layers of `hidden_size` attend over whole images in `full_layers` of them, else within windows.
    """

    paths: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    rule: ImageRule
    patch_floats: int
    type_ids: str
    masked: bool
    row_tables: bool
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
        """Elements of its linear layers' weights."""
        return sum(
            p.elements * p.count for p in self.parameters if p.module_class == "Linear" and p.kind == "weight"
        )

    def flops(self, patches: int) -> float:
        """Operations of matrix products for a sequence's patches: its layers', those of what patches are
        merged by, and attention's over whole images or within windows. A sequence's images of no fixed size
        are taken for one.
        """
        inside = sum(
            p.elements * p.count
            for p in self.parameters
            if p.module_class == "Linear" and p.kind == "weight" and p.in_decoder_layer
        )
        merged = (self.linear_weights - inside) * self.rule.tokens(patches)
        whole = min(patches, self.rule.most_patches) if self.rule.resize == SQUARE else patches
        pairs = patches * (self.full_layers * whole + (self.depth - self.full_layers) * min(WINDOW, whole))
        return 2.0 * (inside * patches + merged) + 4.0 * self.hidden_size * pairs

    def launches(self, recorded: TowerPass) -> float:
        """Kernels that a look at images launches, about: a buffer each, of two layers as recorded. Those of
        single windows are not in it.
        """
        return sum(event >= 0 for event in recorded.events) * self.depth / 2

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
