"""Which models are loaded with their vision tower, and where it is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.models.vision_families import FAMILIES
from planner.base.errors import InputError, shorten
from planner.models.vision_config import WHOLE_TYPES
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def tower_paths(config: PretrainedConfig) -> tuple[str, ...]:
    """Paths of the vision tower of a config's model; none for a model of text."""
    family = FAMILIES.get(config.model_type)
    return family.paths if family is not None and hasattr(config, "vision_config") else ()


def tower_of(setup: TrainingSetup, source: str, *, allow_download: bool) -> tuple[str, ...]:
    """Paths of the vision tower of a model that is loaded with it: where there are images, or where its
    language model is there in no other way.

    Raises:
        InputError: images, and a model without a tower.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=not allow_download
        )
    except (OSError, ValueError) as error:
        why = shorten(str(error).strip().partition("\n")[0], 200)
        raise InputError(f"{source}: the model could not be loaded: {why}") from error
    if not setup.image_patches and config.model_type not in WHOLE_TYPES:
        return ()
    found = tower_paths(config)
    if not found:
        raise InputError(
            f"{source} (model_type {config.model_type}) is no vision-language model that is trained"
        )
    return found


def drop_tower(model: PreTrainedModel) -> None:
    """Let go of a vision tower that a run without images has no use for: transformers builds Gemma 3 of 4B
    and up whole, as its causal language model (models/auto/modeling_auto.py).
    """
    from torch import nn

    for path in tower_paths(model.config):
        holder, _, name = path.rpartition(".")
        setattr(model.get_submodule(holder), name, nn.Identity())
