"""What PEFT is to pass over where it takes all linear layers, or names that more than one part has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from launcher.training.loading.tower import tower_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def left_alone(model: PreTrainedModel | None) -> list[str] | str | None:
    """A pattern of paths, or names: a vision tower, or routers; null for nothing."""
    from torch import nn

    tower = (
        []
        if model is None
        else [
            path
            for path in tower_paths(model.config)
            if any(isinstance(module, nn.Linear) for module in model.get_submodule(path).modules())
        ]
    )
    if tower:
        return "|".join(rf"{re.escape(path)}\..*" for path in tower)
    return _linear_routers(model) or None


def _linear_routers(model: PreTrainedModel | None) -> list[str]:
    from torch import nn

    found = [] if model is None else list(model.named_modules())
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in found
            if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")
        }
    )
