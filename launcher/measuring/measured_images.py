"""The demo's drawn images as data for measured runs of vision-language models, whose weights are random."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.models.vision_families import FAMILIES
from launcher.training import dataset
from launcher.training.images.tokens import ImageTokens, processor_of, tokens_of
from planner.base.data_files import PROFILES
from planner.base.errors import InputError
from planner.data.lengths import DatasetStats
from planner.models.vision_config import PROCESSOR_FILE
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCALES = (1, 2, 4)
"""How many times as large as they were drawn images may be shown."""
DRAWN_LEARNING_RATE = 1e-3
"""At which random weights learn the answers within a few steps."""
DRAWN = PROFILES / "demo" / "images"
QUESTIONS = "shapes.jsonl"


def processor_path(model_id: str) -> Path:
    """Where the image processor's config of a catalog model or of a folder lies, if it has one."""
    folder = Path(model_id)
    if folder.is_dir():
        return folder / PROCESSOR_FILE
    return PROFILES / "configs" / "processors" / f"{model_id}.json"


@dataclass(frozen=True, kw_only=True)
class DrawnImages:
    """Rows, and what reads them: the demo's tokenizer with the model's tokens, and the image processor."""

    tokenizer: Any
    rows: Any
    tokens: ImageTokens
    processor: Any
    stats: DatasetStats


def drawn_images(setup: TrainingSetup, config: PretrainedConfig) -> DrawnImages:
    """The drawn images at the scale at which they have the setup's patches.

    Raises:
        InputError: there is no such scale, or they are longer than the setup's sequences.
    """
    for scale in SCALES:
        found = drawn_at(setup.model, config, scale)
        if found.stats.image_patches == setup.image_patches:
            break
    else:
        raise InputError(
            f"the drawn images have no {setup.image_patches} patches at any of the scales {SCALES}"
        )
    if found.stats.longest > setup.max_length:
        raise InputError(f"the drawn images take {found.stats.longest} tokens, more than {setup.max_length}")
    return found


def drawn_at(model_id: str, config: PretrainedConfig, scale: int) -> DrawnImages:
    """The drawn images at a scale, for a catalog model or that of a folder."""
    from launcher.training.build import load_tokenizer

    values = json.loads(processor_path(model_id).read_bytes())
    tokenizer = load_tokenizer(str(PROFILES / "demo" / "model"), allow_download=False)
    _prepare(tokenizer, config)
    tokens = tokens_of(config, values, tokenizer)
    data = dataset.read_dataset(Path(_folder(scale).name) / QUESTIONS if scale > 1 else DRAWN / QUESTIONS)
    stats = dataset.measure_stats(data, tokenizer, images=tokens)
    rows = dataset.to_trl_dataset(data, tokenizer, max_length=stats.longest, images=tokens)
    return DrawnImages(
        tokenizer=tokenizer,
        rows=rows,
        tokens=tokens,
        processor=processor_of(config.model_type, values),
        stats=stats,
    )


@lru_cache(maxsize=len(SCALES))
def _folder(scale: int) -> tempfile.TemporaryDirectory[str]:
    """The images so many times as large, with their questions, until the process ends."""
    from PIL import Image

    made = tempfile.TemporaryDirectory(prefix="vramwise-images-")
    for path in sorted(DRAWN.iterdir()):
        if path.suffix != ".png":
            shutil.copy(path, made.name)
            continue
        with Image.open(path) as image:
            size = (image.width * scale, image.height * scale)
            image.convert("RGB").resize(size, Image.Resampling.NEAREST).save(Path(made.name) / path.name)
    return made


def _prepare(tokenizer: Any, config: PretrainedConfig) -> None:
    """Give the demo's tokenizer what writes images: tokens, whose ids the config gets, and a template."""
    family = FAMILIES[config.model_type]
    placeholder, before, token, after = family.written
    own = dict.fromkeys((placeholder, token, before.strip(), after.strip()))
    tokenizer.add_special_tokens({"additional_special_tokens": [one for one in own if one]})
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + placeholder + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids(token)
