"""Find a model by what a person typed: a catalog name, a Hub id or a folder with config.json.

The catalog is profiles/models: one spec a model, index.json with every name, configs.json with the fields by
which a config.json is recognised. All three are written by `vramwise models inspect --all`. Looking a name up
opens the index and one spec.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from planner.base import data_files
from planner.base.errors import InputError, MissingExtraError, UnknownNameError, shorten
from planner.base.values import dataclass
from planner.models import hub_config, vision_config
from planner.models.checkpoint import is_dequantised
from planner.models.quantised import with_checkpoint
from planner.models.spec import ModelSpec

MODELS = data_files.PROFILES / "models"
MAX_NAME = 4096
# Organisations that publish unchanged copies under the original's name.
_MIRRORS = ("unsloth/", "nousresearch/")
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_HINT = "(a catalog name, a Hub id such as Qwen/Qwen2.5-14B, or a folder with config.json)"


_NEARLY = 0.65
_SIZE = re.compile(r"(?<![a-z\d])(\d{1,3}(?:-\d)?)-?b(?![a-z])")
_QUANTISED = re.compile(
    r"-(?:unsloth-)?(?:bnb-4-?bit|bnb-8-?bit|gptq|awq|fp-8|gguf|4-?bit|8-?bit|int-?[48]).*$"
)
"""How names of quantised copies end, in name_key's spelling."""


class Inspector(Protocol):
    """Describes the model of a config that no catalog model equals; needs the training stack."""

    def __call__(self, config: Mapping[str, Any], *, model_id: str, hub_id: str) -> ModelSpec:
        """Return the spec, or raise InputError or MissingExtraError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """A catalog model in a list. `parameter_count` counts tied parameters once."""

    id: str
    hub_id: str
    aliases: tuple[str, ...]
    architecture: str
    parameter_count: int
    max_position_embeddings: int
    experts: int

    @property
    def sees_images(self) -> bool:
        """Whether it is described with a vision tower, for data with images."""
        return self.architecture.endswith("ForConditionalGeneration")


def name_key(name: str) -> str:
    """One form for the spellings of a name: "Llama 3.1 8B", "llama3.1-8b" and "llama_3_1_8b" are one.

    Case and separators do not count, nor does a separator between a letter and the digit after it.
    """
    organisation, slash, rest = name.lower().rpartition("/")
    parts = re.sub(r"[\s_.\-]+", "-", rest.strip())
    return organisation.strip() + slash + re.sub(r"(?<=[a-z])-?(?=\d)", "-", parts).strip("-")


def catalog_ids() -> tuple[str, ...]:
    """Ids of the shipped models, in the catalog's order."""
    return tuple(model["id"] for model in _index()["models"])


def list_models() -> tuple[ModelSummary, ...]:
    """What the catalog holds, without opening the specs."""
    return tuple(ModelSummary(**{**m, "aliases": tuple(m["aliases"])}) for m in _index()["models"])


def resolve_model(
    name: str, *, allow_network: bool = False, inspector: Inspector | None = None, images: bool = False
) -> ModelSpec:
    """Find the model that a name stands for; with `images` the whole of a vision-language model, where the
    name without them stands for its language model.

    In this order: a catalog name; a model the person inspected before (user_data_dir()/models); a folder; a
    Hub id, whose config.json comes from the Hub's local cache or, with `allow_network`, from the network
    (HF_HUB_OFFLINE is respected). A path that starts with a dot, a slash or ~ is only taken as a folder.
    A config.json that equals a catalog model's in all that matters gets that model's spec; any other needs
    `inspector`. The download size of a spec is that of its parameters in 16 bits, as models are published.

    Raises:
        UnknownNameError: no model has that name; close names are suggested.
        InputError: the folder or its config.json is unusable, or the Hub's cache lacks it.
        MissingExtraError: the architecture needs the training stack, which is not installed.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise InputError(f"model {shorten(name)} is not a name {_HINT}")
    if name.startswith((".", "/", "~")):
        return _from_folder(Path(name).expanduser(), inspector, images)
    found = _from_catalog(name) or _from_user(name)
    if found is not None:
        return _with_tower(found) if images else found
    if Path(name).is_dir():
        return _from_folder(Path(name), inspector, images)
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, allow_network, inspector, images)
    raise _unknown(name, _HINT)


def written_nearly(name: str) -> list[str]:
    """Ids of the catalog that may be meant by a name, or by that of a quantised copy."""
    by_key = {name_key(model_id): model_id for model_id in catalog_ids()}
    return [by_key[one] for one in difflib.get_close_matches(_bare(name), by_key, n=3, cutoff=_NEARLY)]


def nearest_models(name: str) -> str:
    """What of the catalog to try for a name that it does not have, as the end of a sentence; may be empty."""
    near = written_nearly(name)
    if near:
        return f"; did you mean {', '.join(near)}?"
    size = _SIZE.search(_bare(name))
    if size is None:
        return ""
    wanted = math.log(max(float(size[1].replace("-", ".")), 0.01) * 1e9)
    by_size = sorted(list_models(), key=lambda model: abs(math.log(model.parameter_count) - wanted))
    return f"; of about its size there are {by_size[0].id} and {by_size[1].id}"


def _bare(name: str) -> str:
    return re.sub(_QUANTISED, "", name_key(name.rpartition("/")[2]))


def match_config(config: Mapping[str, Any], *, hub_id: str) -> ModelSpec | None:
    """The catalog model whose shapes and memory a config describes; None if there is none.

    Every field of the config must be one the catalog model has with that value, and every field without which
    transformers would build another model must be there.
    """
    text, _ = hub_config.text_part(config)
    whole = vision_config.PROCESSOR in config
    fields = vision_config.whole_fields(config) if whole else hub_config.relevant_fields(text)
    equal = [load_shipped(model_id) for model_id, known in _configs().items() if _equals(fields, known)]
    if not equal:
        return None
    positions = text.get("max_position_embeddings", equal[0].max_position_embeddings)
    spec = next((s for s in equal if s.max_position_embeddings == positions), equal[0])
    note = f"{spec.source}; config.json equal to {spec.id}"
    return replace(spec, hub_id=hub_id, max_position_embeddings=positions, source=note)


def _equals(fields: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    accepted = known["accepted"]  # a field that the catalog model does not have may be there as null
    return all(key in fields for key in known["required"]) and all(
        value in accepted.get(key, (None,)) for key, value in fields.items()
    )


def _with_tower(spec: ModelSpec) -> ModelSpec:
    """The catalog's description of a model with its tower.

    Raises:
        InputError: there is none.
    """
    if spec.tower is not None:
        return spec
    whole = catalog_id(f"{spec.id}-vision")
    if whole is None:
        seeing = ", ".join(model.id for model in list_models() if load_shipped(model.id).tower is not None)
        raise InputError(
            f"{spec.id} is a model of text: images are trained with {seeing}, or with a folder of a "
            f"vision-language model of type {', '.join(sorted(vision_config.VISION_TYPES))}"
        )
    return load_shipped(whole)


@functools.cache
def load_shipped(model_id: str) -> ModelSpec:
    """Spec of a catalog id."""
    return _load_spec(MODELS / f"{model_id}.json")


def _from_catalog(name: str) -> ModelSpec | None:
    names: Mapping[str, str] = _index()["names"]
    key = name_key(name)
    model_id = names.get(key)
    for mirror in _MIRRORS:
        if model_id is None and key.startswith(mirror):
            model_id = names.get(key.removeprefix(mirror))
    return None if model_id is None else load_shipped(model_id)


def catalog_id(name: str) -> str | None:
    """Id of the catalog model that goes by a name; None where none does. No spec is opened."""
    names: Mapping[str, str] = _index()["names"]
    return names.get(name_key(name))


def user_spec_path(name: str) -> Path:
    """Where a model that the person inspected is kept."""
    return data_files.user_data_dir() / "models" / f"{name_key(name).replace('/', '--')}.json"


def _from_user(name: str) -> ModelSpec | None:
    path = user_spec_path(name)
    try:
        return _load_spec(path) if path.is_file() else None
    except OSError:  # a name too long for the file system is no file
        return None


def _load_spec(path: Path) -> ModelSpec:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {shorten(str(path))}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shorten(str(path))} is not a model spec: {shorten(str(error))}") from error
    if not isinstance(values, dict):
        raise InputError(f"{shorten(str(path))} is not a model spec: it holds no JSON object")
    return ModelSpec.from_dict(values)


def _from_folder(folder: Path, inspector: Inspector | None, images: bool) -> ModelSpec:
    config: Mapping[str, Any] = hub_config.read_config(folder)
    if _takes_whole(config, str(folder), images):
        processor = vision_config.processor_of(folder)
        config = vision_config.with_processor(
            config, processor, where=f"{folder}/{vision_config.PROCESSOR_FILE}"
        )
    return _from_config(
        config, name=folder.resolve().name or str(folder), where=str(folder), inspector=inspector
    )


def _from_config(
    config: Mapping[str, Any], *, name: str, where: str, inspector: Inspector | None
) -> ModelSpec:
    checkpoint = hub_config.quantisation_of(config, where=where)
    if checkpoint is not None or is_dequantised(config):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        if hub_config.text_part(config)[1]:
            raise InputError(
                f"{shorten(where)}: quantised weights of a vision-language model are not trained: use the "
                "16-bit model that they were made from"
            )
    found = match_config(config, hub_id=where)
    if found is not None:
        return with_checkpoint(_as_processed(found, config), checkpoint)
    if inspector is None:
        raise MissingExtraError(
            f"{shorten(where)} ({config['model_type']}) equals no catalog model; describing it",
            "torch and transformers",
        )
    return with_checkpoint(inspector(config, model_id=name, hub_id=where), checkpoint)


def _as_processed(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    """A catalog model with the pixels that a folder's own image processor leaves of an image."""
    processor = config.get(vision_config.PROCESSOR)
    if spec.tower is None or not processor:
        return spec
    return replace(
        spec, tower=replace(spec.tower, rule=vision_config.as_processed(spec.tower.rule, processor))
    )


def _takes_whole(config: Mapping[str, Any], where: str, images: bool) -> bool:
    """Whether a config is to be described with its tower.

    Raises:
        InputError: images are asked for, and it has none that is described.
    """
    if images and not vision_config.sees_images(config):
        known = ", ".join(sorted(vision_config.VISION_TYPES))
        raise InputError(
            f"{shorten(where)} (model_type {shorten(config['model_type'])}): images are trained with "
            f"models of type {known}"
        )
    return images or (config["model_type"] in vision_config.WHOLE_TYPES and vision_config.sees_images(config))


def _from_hub(repository: str, allow_network: bool, inspector: Inspector | None, images: bool) -> ModelSpec:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    offline = not allow_network or constants.HF_HUB_OFFLINE
    try:
        path = Path(hf_hub_download(repository, "config.json", local_files_only=offline))
        config: Mapping[str, Any] = hub_config.parse_config(
            _read_limited(path), where=f"config.json of {repository}"
        )
        if _takes_whole(config, repository, images):
            named = vision_config.PROCESSOR_FILE
            content = Path(hf_hub_download(repository, named, local_files_only=offline)).read_bytes()
            config = vision_config.with_processor(config, content, where=f"{named} of {repository}")
    except HFValidationError as error:
        raise _unknown(repository, _HINT) from error
    except (HfHubHTTPError, OSError) as error:
        if not offline:
            raise _not_fetched(repository, error) from error
        raise _not_here(repository, allow_network) from error
    return _from_config(config, name=repository.rpartition("/")[2], where=repository, inspector=inspector)


def _not_fetched(repository: str, error: Exception) -> InputError:
    """Why the Hub gave no config.json, and what can be done."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return InputError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository} and log in "
            "(hf auth login)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return _unknown(repository, "(neither in the catalog nor on the Hub, unless it is private)")
    return InputError(f"cannot get config.json of {repository} from the Hub: {_first_line(error)}")


def _not_here(repository: str, allow_network: bool) -> UnknownNameError:
    """Why a Hub id cannot be planned, and what can be done."""
    how = "HF_HUB_OFFLINE is set" if allow_network else "--allow-download fetches its config.json"
    where = f"(neither in the catalog nor in the Hugging Face cache; {how})"
    near = written_nearly(repository)
    if near and re.search(_QUANTISED, name_key(repository.rpartition("/")[2])):
        made_from = f"; QLoRA quantises while loading: plan what it was made from, {near[0]}"
        return UnknownNameError("model", repository, (), where + made_from)
    return _unknown(repository, where)


def _unknown(name: str, hint: str) -> UnknownNameError:
    return UnknownNameError("model", name, (), hint + nearest_models(name))


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(hub_config.MAX_CONFIG_BYTES + 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


@functools.cache
def _index() -> dict[str, Any]:
    return _load_table("index.json")


@functools.cache
def _configs() -> dict[str, Any]:
    return _load_table("configs.json")


def _load_table(name: str) -> dict[str, Any]:
    try:
        table = json.loads((MODELS / name).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"the model catalog is damaged ({name}): reinstall vramwise") from error
    if not isinstance(table, dict):
        raise InputError(f"the model catalog is damaged ({name}): reinstall vramwise")
    return table
