"""Trainers' files: YAML read with bounds, the trainer that a file is for, and its reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planner.base.errors import FieldError, InputError, shorten
from planner.base.values import dataclass
from planner.gpus.target import GpuTarget
from planner.setup.training_setup import TrainingSetup
from planner.trainers import axolotl, llamafactory, trl_sft, unsloth
from planner.trainers.config import TrainerConfig

MAX_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """A trainer: its name on the command line, what reads and writes its config, and how it is installed and
    started with a config of the name `file`, a YAML file or what `script` makes of the settings.
    """

    name: str
    title: str
    version: str
    file: str
    install: str
    start: str
    read: Callable[..., TrainerConfig]
    write: Callable[[TrainingSetup, str, float, float], dict[str, Any]]
    lacking: tuple[str, ...]
    script: Callable[[Mapping[str, Any]], str] | None = None


TRAINERS: dict[str, Trainer] = {
    "axolotl": Trainer(
        name="axolotl",
        title="Axolotl",
        version=axolotl.VERSION,
        file="axolotl.yml",
        install=axolotl.INSTALL,
        start="axolotl train axolotl.yml",
        read=axolotl.read,
        write=axolotl.write,
        lacking=axolotl.LACKING,
    ),
    "llamafactory": Trainer(
        name="llamafactory",
        title="LLaMA-Factory",
        version=llamafactory.VERSION,
        file="llamafactory.yaml",
        install=llamafactory.INSTALL,
        start="llamafactory-cli train llamafactory.yaml",
        read=llamafactory.read,
        write=llamafactory.write,
        lacking=llamafactory.LACKING,
    ),
    "trl": Trainer(
        name="trl",
        title="trl sft",
        version=trl_sft.VERSION,
        file="sft.yaml",
        install=trl_sft.INSTALL,
        start="trl sft --config sft.yaml",
        read=trl_sft.read,
        write=trl_sft.write,
        lacking=trl_sft.LACKING,
    ),
    "unsloth": Trainer(
        name="unsloth",
        title="Unsloth",
        version=unsloth.VERSION,
        file="unsloth_train.py",
        install=unsloth.INSTALL,
        start="python unsloth_train.py",
        read=unsloth.read,
        write=unsloth.write,
        lacking=unsloth.LACKING,
        script=unsloth.script,
    ),
}
_LLAMA_FACTORY_KEYS = frozenset(
    {"finetuning_type", "stage", "cutoff_len", "template", "dataset_dir", "lora_rank", "lora_target"}
)


def read_values(path: Path) -> Mapping[str, Any]:
    """The settings of a config: a YAML file's, or those of the calls of a script, which is not run.

    Raises:
        InputError: it cannot be read, is too large, or holds no settings.
    """
    if path.suffix.lower() != ".py":
        return read_yaml(path)
    content = _content(path)
    try:
        return unsloth.parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{shorten(str(path))} is no text") from error
    except InputError as error:
        raise InputError(f"{shorten(str(path))}: {error}") from error


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{shorten(str(path))} cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{shorten(str(path))} is larger than {MAX_BYTES:,} bytes")
    return content


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A YAML file's mapping, plain values alone.

    Raises:
        InputError: it cannot be read, is too large, or is no YAML mapping.
    """
    import yaml

    content = _content(path)
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{shorten(str(path))} is no YAML: {shorten(str(error), 120)}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{shorten(str(path))} holds no mapping of settings")
    return values


def trainer_of(values: Mapping[str, Any], name: str | None = None) -> Trainer:
    """The trainer that a config is for: the named one, else the one whose keys it has.

    Raises:
        InputError: it is nobody's that is known.
    """
    if name is not None:
        if name not in TRAINERS:
            raise FieldError("--trainer", name, "one of " + ", ".join(TRAINERS))
        return TRAINERS[name]
    if "base_model" in values:
        return TRAINERS["axolotl"]
    if "model_name_or_path" in values:
        return TRAINERS["llamafactory" if _LLAMA_FACTORY_KEYS & values.keys() else "trl"]
    if "model_name" in values:
        return TRAINERS["unsloth"]
    raise InputError(
        "neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory, trl sft) "
        "nor model_name (Unsloth) is in the config"
    )


def read_config(
    path: Path, target: GpuTarget, *, trainer: str | None = None, accelerate: Path | None = None
) -> TrainerConfig:
    """Read a trainer's config for a card, with accelerate's file beside it where there is one.

    Raises:
        InputError: a file cannot be read, or asks for what is not planned.
    """
    values = read_values(path)
    sharing = None if accelerate is None else _sharing(read_yaml(accelerate))
    count = target.count if sharing is None else int(sharing["num_processes"])
    found = trainer_of(values, trainer).read(values, auto_dtype=target.spec.dtype, gpus=count)
    if sharing is None or count == 1:
        return found
    from dataclasses import replace

    return replace(found, setup=found.setup.replace(**sharing))


_DISTRIBUTED = {"NO": None, "MULTI_GPU": "ddp", "FSDP": "fsdp"}


def _sharing(values: Mapping[str, Any]) -> dict[str, Any]:
    """What accelerate's file says of how many GPUs share the work, and how."""
    kind = values.get("distributed_type", "NO")
    if kind not in _DISTRIBUTED:
        raise FieldError("distributed_type", kind, "one of " + ", ".join(_DISTRIBUTED))
    count = values.get("num_processes", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise FieldError("num_processes", count, "a whole number from 1 on")
    if kind == "FSDP" and (values.get("fsdp_config") or {}).get("fsdp_version", 1) != 2:
        raise InputError("fsdp_config: fsdp_version 2 alone is planned")
    return {"num_processes": count, "distributed": _DISTRIBUTED[kind] if count > 1 else None}
