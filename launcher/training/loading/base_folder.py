"""The folder of a base model: its config, its shards, and the shape and dtype of every tensor in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.training.loading.dequantised import as_plain
from launcher.training.loading.microscaled import microscaled_as_plain
from launcher.training.loading.stored_tensor import StoredTensor
from planner.base.errors import InputError, shorten
from planner.models import hub_config
from planner.models.checkpoint import Checkpoint, is_dequantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json"),
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
OTHER_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFolder:
    """A base model on this machine; `name` is what it was asked by, a folder or a Hub id.

    `checkpoint` says how its weights are stored where they are quantised: `tensors` are those that they stand
    for then.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    checkpoint: Checkpoint | None = None

    @property
    def dtype(self) -> str | None:
        """The dtype that its config names."""
        return self.config.get("dtype") or self.config.get("torch_dtype")


def find_base(source: str, *, allow_download: bool) -> BaseFolder:
    """Find a base model by its folder or Hub id and read the heads of its shards.

    Raises:
        InputError: it is not on this machine and may not be fetched, or is no 16-bit model in safetensors.
    """
    folder = Path(source).expanduser()
    path = folder.resolve() if folder.is_dir() else _of_the_hub(source, allow_download=allow_download)
    config = hub_config.read_config(path)
    checkpoint, tensors = hub_config.quantisation_of(config, where=source), _stored(path)
    if checkpoint is not None:
        tensors = as_plain(tensors)
    elif is_dequantised(config):
        tensors = microscaled_as_plain(tensors)
    return BaseFolder(path=path, name=source, config=config, tensors=tensors, checkpoint=checkpoint)


def _of_the_hub(source: str, *, allow_download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", INDEX, "config.json", *TOKENIZER_FILES, *TEMPLATE_FILES, *OTHER_FILES]
    try:
        return Path(snapshot_download(source, local_files_only=not allow_download, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"the base model {shorten(source)} is not on this machine: --model names the folder it is in, or "
            "--allow-download fetches it"
        ) from error


def _stored(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for file in _shards(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    entry = opened.get_slice(name)
                    found[name] = StoredTensor(
                        file=file, shape=tuple(entry.get_shape()), dtype=str(entry.get_dtype())
                    )
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not readable safetensors ({shorten(str(error), 80)})") from error
    return found


def _shards(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not a readable index of shards") from error
        if any(Path(name).name != name for name in names):
            raise InputError(f"{index}: a shard lies outside the model's folder")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(names)} shards are)")
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    raise InputError(f"{path}: no weights in safetensors ({SINGLE} or {INDEX}); no other form is loaded")
