"""The libraries that train a model: what its memory and speed rest on."""

from __future__ import annotations

from dataclasses import dataclass

from planner.base import validate
from planner.base.errors import FieldError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A training stack, named after its trainer.

    `packages` are those whose releases change memory or speed: records and coefficients carry their versions.
    """

    name: str
    packages: tuple[str, ...]

    def __post_init__(self) -> None:
        validate.text("stack", self.name)
        if not self.packages:
            raise FieldError("packages", self.packages, "at least one package")


TRL = Stack(name="trl", packages=("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"))
