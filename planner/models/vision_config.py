"""Configs of vision-language models: which they are, what decides shapes, and their image processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.base.errors import InputError
from planner.data.image_rule import SQUARE, ImageRule
from planner.models import hub_config

VISION_TYPES = frozenset({"gemma3", "qwen2_5_vl"})
"""model_type of what launcher/models/vision.py describes with its tower."""
WHOLE_TYPES = frozenset({"qwen2_5_vl"})
"""Those whose language model transformers builds in no other way."""
PROCESSOR = "preprocessor_config"
"""Key under which the content of preprocessor_config.json goes with a config that is to be described with its
tower."""
PROCESSOR_FILE = "preprocessor_config.json"
_PARTS = ("vision_config", "text_config", PROCESSOR)
_OF_WHOLE = ("model_type", "mm_tokens_per_image", "tie_word_embeddings")
_NOT_SHAPES = ("fullatt_block_indexes", "tokens_per_second", "spatial_patch_size", "in_chans")


def sees_images(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a vision-language model that is described with its tower."""
    return config.get("model_type") in VISION_TYPES and isinstance(config.get("vision_config"), Mapping)


def whole_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a vision-language config that decide shapes and memory, those of its parts by their part.

    Published configs of Qwen2.5-VL have the language model's fields beside the vision model's.
    """
    inner = config.get("text_config")
    flat = {key: value for key, value in config.items() if key not in _PARTS}
    text = (
        dict(inner) if isinstance(inner, Mapping) else {**flat, "model_type": f"{config['model_type']}_text"}
    )
    fields = {f"whole.{key}": config[key] for key in _OF_WHOLE if key in config}
    fields |= {f"text.{key}": value for key, value in hub_config.relevant_fields(text).items()}
    vision = config.get("vision_config")
    if isinstance(vision, Mapping):
        known = hub_config.relevant_fields(vision)
        fields |= {f"vision.{key}": value for key, value in known.items() if key not in _NOT_SHAPES}
    return {key: value for key, value in fields.items() if not key.endswith("_token_id")}


def with_processor(config: Mapping[str, Any], content: bytes | None, *, where: str) -> dict[str, Any]:
    """A config with the image processor's, as an Inspector takes what it is to describe with its tower.

    Raises:
        InputError: the processor's is out of bounds, or no JSON.
    """
    processor: Mapping[str, Any] = {}
    if content is not None:
        processor = hub_config.parse_config(
            b'{"model_type": "processor", "it": ' + content + b"}", where=where
        )["it"]
        if not isinstance(processor, Mapping):
            raise InputError(f"{where} must hold a JSON object")
    return {**config, PROCESSOR: dict(processor)}


def as_processed(rule: ImageRule, processor: Mapping[str, Any]) -> ImageRule:
    """A rule with what a processor's config says of pixels.

    Raises:
        InputError: it says what is not counted.
    """
    if processor.get("do_pan_and_scan"):
        raise InputError(
            "do_pan_and_scan cuts images into crops, whose tokens are not counted: set it to false"
        )
    if rule.resize == SQUARE:
        return rule
    size = processor.get("size") or {}
    return replace(
        rule,
        min_pixels=processor.get("min_pixels") or size.get("shortest_edge") or rule.min_pixels,
        max_pixels=processor.get("max_pixels") or size.get("longest_edge") or rule.max_pixels,
    )


def processor_of(folder: Path) -> bytes | None:
    """The content of a folder's preprocessor_config.json; None where it has none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / PROCESSOR_FILE
    try:
        return path.read_bytes()[: hub_config.MAX_CONFIG_BYTES + 1] if path.is_file() else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
