"""Vision-language models: the language part by its recipe, the tower by recording what runs before it.

Only families whose forward pass around both was read are described (transformers 5.23, models/qwen2_5_vl and
models/gemma3): tokens are embedded, the tower and its projector see the pixels, what comes of them takes the
place of the images' tokens, and the language model goes on as it does with text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launcher.models.tracing.tower import recorded_passes
from launcher.models.vision_families import FAMILIES, Family
from planner.base.errors import InputError
from planner.models.parameter import Parameter
from planner.models.spec import ModelSpec
from planner.models.tower import Tower
from planner.models.vision_config import as_processed


class LanguagePart(nn.Module):  # type: ignore[misc]  # torch has no types here
    """The language model of a vision-language one, in the form of a causal language model."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.model, self.lm_head = whole.model.language_model, whole.lm_head
        self.config = whole.model.language_model.config

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.lm_head

    def get_input_embeddings(self) -> Any:
        """The embeddings."""
        return self.model.embed_tokens


def build_whole(values: Mapping[str, Any]) -> Any:
    """The vision-language model of a config on the meta device.

    Raises:
        InputError: it is of another kind than those of FAMILIES.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    rest = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    model_type = str(values["model_type"])
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"images are not trained with models of type {model_type}, but with {known}")
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **rest))


def renamed(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The language part's parameters by their names in the whole."""
    inner = "model.language_model."
    return tuple(
        replace(one, name=inner + one.name.removeprefix("model.")) if one.name.startswith("model.") else one
        for one in parameters
    )


def describe_vision(
    values: Mapping[str, Any],
    processor: Mapping[str, Any],
    *,
    model_id: str,
    hub_id: str,
    aliases: tuple[str, ...],
    note: str,
) -> ModelSpec:
    """Describe a vision-language model.

    Args:
        values: The content of its config.json.
        processor: That of its preprocessor_config.json, empty where there is none.
        model_id: As of inspect_config, with the rest.

    Raises:
        InputError: it is of a type that is not described, or has parts that are not understood.
    """
    from launcher.models.inspect import describe_by_recipe

    whole = build_whole(values)
    tower = describe_tower(values, whole, processor)
    text = describe_by_recipe(
        LanguagePart(whole), model_id=model_id, hub_id=hub_id, aliases=aliases, note=note
    )
    assert text.download_bytes is not None
    return replace(
        text,
        architecture=type(whole).__name__,
        parameters=renamed(text.parameters),
        download_bytes=text.download_bytes + 2 * tower.parameter_count,
        tower=tower,
    )


def describe_tower(values: Mapping[str, Any], whole: Any, processor: Mapping[str, Any]) -> Tower:
    """The tower of a model on the meta device.

    Args:
        values: The model's config.json.
        whole: The model that it builds.
        processor: The content of preprocessor_config.json, empty where there is none.
    """
    family = FAMILIES[values["model_type"]]
    config, vision = whole.config, whole.config.vision_config
    rule = as_processed(family.rule(config), processor)
    depth = len(whole.get_submodule(family.layers))
    full = getattr(vision, "fullatt_block_indexes", None)
    channels = int(getattr(vision, "in_channels", 0) or vision.num_channels)
    frames = int(getattr(vision, "temporal_patch_size", 1))
    return Tower(
        paths=family.paths,
        parameters=tuple(_parameters(whole, family)),
        rule=rule,
        patch_floats=channels * frames * rule.patch_size**2,
        type_ids=family.type_ids,
        masked=family.masked,
        row_tables=family.row_tables,
        hidden_size=vision.hidden_size,
        depth=depth,
        full_layers=depth if full is None else len(full),
        passes=tuple(recorded_passes(values, rule)),
    )


def _parameters(whole: Any, family: Family) -> Iterator[Parameter]:
    """The tower's, in the model's order, those of its layers under one name."""
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, parameter in whole.named_parameters():
        if not name.startswith(tuple(path + "." for path in family.paths)):
            continue
        owner = type(whole.get_submodule(name.rpartition(".")[0])).__name__
        if name.startswith(family.layers + "."):
            _, _, rest = name.removeprefix(family.layers + ".").partition(".")
            name = f"{family.layers}.*.{rest}"
        key = name, owner, tuple(parameter.shape)
        counts[key] = counts.get(key, 0) + 1
    for (name, owner, shape), count in counts.items():
        yield Parameter(name=name, module_class=owner, shape=shape, count=count)
