"""How a model's processor writes images into chats, and the image processor itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.models.vision_families import FAMILIES
from planner.base.errors import InputError, MissingExtraError, shorten
from planner.data.examples import Picture
from planner.data.image_rule import ImageRule
from planner.models.vision_config import PROCESSOR_FILE, as_processed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from launcher.runs.training_job import TrainingJob


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How a model's processor writes images into a chat: `placeholder` is what its template writes for one,
    `before`, `token` as often as the image has tokens, and `after` are put in its place. `rule` counts them,
    `type_ids` names the input that tells which tokens are images'.
    """

    placeholder: str
    before: str
    token: str
    after: str
    token_id: int
    rule: ImageRule
    type_ids: str

    def expanded(self, text: str, pictures: Sequence[Picture], where: str) -> str:
        """A chat's text with the tokens of its pictures.

        Raises:
            InputError: it does not show the first of them, as many as it has places for.
        """
        first, *rest = text.split(self.placeholder)
        if len(rest) > len(pictures):
            raise InputError(f"{where}: the text has {self.placeholder}, which stands for an image alone")
        written = [first]
        for picture, following in zip(pictures, rest, strict=False):
            count = self.rule.tokens(self.rule.patches(picture.size))
            written += [self.before, self.token * count, self.after, following]
        return "".join(written)

    def shown(self, text: str) -> int:
        """How many pictures a chat's text has places for."""
        return text.count(self.placeholder)


def image_tokens(source: str, tokenizer: PreTrainedTokenizerBase, *, allow_download: bool) -> ImageTokens:
    """How the model of a folder or Hub id writes images.

    Raises:
        InputError: it sees none, or of a type that is not trained with images.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=not allow_download
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no config could be read: {shorten(str(error), 120)}") from error
    return tokens_of(config, processor_values(source, allow_download=allow_download), tokenizer)


def tokens_of(
    config: PretrainedConfig, processor: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> ImageTokens:
    """How a model of that config writes images.

    Raises:
        InputError: it sees none, or its tokenizer lacks a token for them.
    """
    if config.model_type not in FAMILIES or not hasattr(config, "vision_config"):
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"images are not trained with models of type {config.model_type}, but with {known}")
    family = FAMILIES[config.model_type]
    placeholder, before, token, after = family.written
    for one in {placeholder, token}:
        if tokenizer.convert_tokens_to_ids(one) in (None, tokenizer.unk_token_id):
            raise InputError(
                f"the tokenizer has no token {one}, which stands for images in this model's chats"
            )
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id != config.image_token_id:
        raise InputError(f"the tokenizer's {token} is {token_id}, the model's {config.image_token_id}")
    return ImageTokens(
        placeholder=placeholder,
        before=before,
        token=token,
        after=after,
        token_id=token_id,
        rule=as_processed(family.rule(config), processor),
        type_ids=family.type_ids,
    )


def processor_values(source: str, *, allow_download: bool) -> dict[str, Any]:
    """The content of a model's preprocessor_config.json.

    Raises:
        InputError: it has none.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(source, PROCESSOR_FILE, local_files_only=not allow_download)
    except OSError as error:
        raise InputError(f"{source}: there is no {PROCESSOR_FILE}: {shorten(str(error), 120)}") from error
    import json

    found: dict[str, Any] = json.loads(Path(path).read_bytes())
    return found


def image_processor(source: str, *, allow_download: bool) -> Any:
    """The image processor of a model, on Pillow and NumPy.

    Raises:
        MissingExtraError: Pillow is not installed.
        InputError: there is none.
    """
    import importlib.util

    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("images", "the package pillow")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=not allow_download)
    values = processor_values(source, allow_download=allow_download)
    return processor_of(config.model_type, values)


def processor_of(model_type: str, values: dict[str, Any]) -> Any:
    """The image processor of a type of model with the settings of a preprocessor_config.json.

    A rule of pixels that an older config has as min_pixels and max_pixels goes with it.
    """
    import importlib

    home, name = FAMILIES[model_type].processor
    own = {key: value for key, value in values.items() if not key.endswith(("_type", "_class"))}
    settings = {key: value for key, value in own.items() if value is not None}
    return getattr(importlib.import_module(home), name)(**settings)


def images_of(job: TrainingJob, tokenizer: PreTrainedTokenizerBase) -> tuple[ImageTokens, Any]:
    """How the model of a job writes images, and its image processor."""
    source, download = job.model_source, job.allow_download
    return (
        image_tokens(source, tokenizer, allow_download=download),
        image_processor(source, allow_download=download),
    )
