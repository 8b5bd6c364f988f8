"""Parameter: tensors of one shape under one name pattern, as a model's description lists them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError
from planner.base.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """Parameters of one shape under one name pattern.

    `name` holds `*` where the decoder layer's index stands ("model.layers.*.self_attn.q_proj.weight");
    `module_class` is the class that owns it ("Linear", "Embedding", "LlamaRMSNorm", "MixtralExperts");
    `shape` is torch's, `count` how many tensors follow the pattern. `tied` marks the output head's
    weight when it is the embedding's own tensor: it is listed for its shape and holds no memory. `kept` marks
    what a checkpoint has in 16 bits where it has its like quantised.
    """

    name: str
    module_class: str
    shape: tuple[int, ...]
    count: int
    tied: bool = False
    kept: bool = False

    def __post_init__(self) -> None:
        validate.text("parameter name", self.name)
        validate.text("module_class", self.module_class)
        if not self.shape:
            raise FieldError(f"{self.name} shape", self.shape, "at least one dimension")
        for size in self.shape:
            validate.integer(f"{self.name} shape", size, minimum=1, maximum=2**40)
        validate.integer(f"{self.name} count", self.count, minimum=1, maximum=10**6)
        validate.boolean(f"{self.name} tied", self.tied)

    @property
    def module_name(self) -> str:
        """Last part of the owning module's path, what PEFT's target_modules match ("q_proj")."""
        parts = self.name.split(".")
        return parts[-2] if len(parts) > 1 else parts[0]

    @property
    def kind(self) -> str:
        """Last part of the name: "weight", "bias", or a bare tensor's own name ("gate_up_proj")."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def in_decoder_layer(self) -> bool:
        """Whether it belongs to the repeated decoder layers."""
        return "*" in self.name

    @property
    def is_output_head(self) -> bool:
        """Whether it belongs to the output head (a Linear outside the decoder layers)."""
        return self.module_class == "Linear" and not self.in_decoder_layer

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding's table."""
        return self.module_class.endswith("Embedding")

    @property
    def elements(self) -> int:
        """Elements of one tensor."""
        return math.prod(self.shape)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Parameter:
        """Read the JSON form, that of dataclasses.asdict."""
        return cls(**{**values, "shape": tuple(values["shape"])})
