"""The merged model on disk: shard by shard into a hidden folder, which takes its name when all is there."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.merging.adapters import Adapters, Rounding
from launcher.training.loading.base_folder import (
    INDEX,
    OTHER_FILES,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    BaseFolder,
)
from launcher.training.loading.skeleton import Group, Skeleton
from launcher.training.loading.stored_tensor import StoredTensor
from planner.base.data_files import write_atomically
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch

PATTERN = "model{suffix}.safetensors"
GENERATION = "generation_config.json"
MODELFILE = ("Modelfile", "FROM .\n")
"""By which Ollama takes the folder that it lies in (https://github.com/ollama/ollama/blob/main/docs/import.mdx)."""
_FLOATS = ("F64", "F32", "BF16", "F16")
Report = Callable[[int, int], None]
"""Told how many shards are written, and of how many."""


@contextmanager
def hidden_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, on the same file system, that is gone afterwards whatever happens.

    What a killed merge left there is removed first; the folder's lock tells it from a living one's.

    Raises:
        InputError: it cannot be made, or another merge writes there.
    """
    path = output.parent / f".{output.name}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{output}: another merge is writing it") from error
        try:
            _empty(path)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def publish(folder: Path, output: Path) -> None:
    """Give a finished folder its name, in one step.

    Raises:
        InputError: something has taken the name meanwhile.
    """
    _sync_folder(folder)
    try:
        folder.rename(output)
    except OSError as error:
        raise InputError(f"{output}: cannot take its name ({error.strerror})") from error
    _sync_folder(output.parent)


def written_bytes(base: BaseFolder) -> int:
    """Bytes of the weights as they are written: numbers that are not whole in 16 bits."""
    return sum(_planned_bytes(tensor) for tensor in base.tensors.values())


def write_weights(
    folder: Path,
    skeleton: Skeleton,
    adapters: Adapters,
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    report: Report,
) -> Rounding:
    """Merge and write every tensor of the base; returns what the rounding to `dtype` left of the change.

    Raises:
        InputError: as Skeleton and Adapters.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    order = {name: skeleton.base.tensors[name] for group in skeleton.groups for name in group.sources}
    plan = split_state_dict_into_shards_factory(
        order,
        get_storage_size=_planned_bytes,
        filename_pattern=PATTERN,
        max_shard_size=shard_bytes,
    )
    rounding = Rounding()
    tensors = _tensors(skeleton, adapters, dtype, rounding)
    waiting: dict[str, torch.Tensor] = {}
    total = 0
    weight_map: dict[str, str] = {}
    report(0, len(plan.filename_to_tensors))
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
        missing = set(names) - set(waiting)
        while missing:
            made = next(tensors)
            waiting |= made
            missing -= set(made)
        shard = {name: waiting.pop(name) for name in names}
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
        weight_map |= dict.fromkeys(names, file)
        _save(folder / file, shard)
        report(number, len(plan.filename_to_tensors))
    if len(plan.filename_to_tensors) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return rounding


def write_rest(folder: Path, base: BaseFolder, adapter: Path, *, dtype: str) -> None:
    """Configs, tokenizer and chat template, the adapter's own where it has any, and Ollama's Modelfile."""
    write_atomically(folder / "config.json", json.dumps(merged_config(base.config, dtype), indent=2) + "\n")
    write_atomically(folder / MODELFILE[0], MODELFILE[1])
    own = (adapter / "tokenizer_config.json").is_file()
    names = [*TOKENIZER_FILES, *OTHER_FILES, *([] if own else TEMPLATE_FILES)]
    for name in names:
        if (base.path / name).is_file():
            _copy(base.path / name, folder / name)
    for name in (*TOKENIZER_FILES, *TEMPLATE_FILES) if own else ():
        if (adapter / name).is_file():
            _copy(adapter / name, folder / name)
    if not (folder / GENERATION).exists():
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
        made = GenerationConfig.from_model_config(config)
        write_atomically(folder / GENERATION, made.to_json_string())


def merged_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The base's config.json as it is for the merged model: not quantised, no code to run, its dtype."""
    left_out = ("quantization_config", "auto_map")
    made = copy.deepcopy({key: value for key, value in config.items() if key not in left_out})
    for part in (made, *(value for value in made.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                part[key] = dtype
    if "torch_dtype" not in made:
        made["dtype"] = dtype
    return made


def _tensors(
    skeleton: Skeleton, adapters: Adapters, dtype: torch.dtype, rounding: Rounding
) -> Iterator[dict[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its name there, a group at a time, merged where it is adapted."""
    for group in skeleton.groups:
        if not group.parameters:
            yield {name: skeleton.raw(name) for name in group.sources}
            continue
        yield skeleton.as_stored(group, _merged(skeleton, adapters, group, dtype, rounding))


def _merged(
    skeleton: Skeleton, adapters: Adapters, group: Group, dtype: torch.dtype, rounding: Rounding
) -> dict[str, torch.Tensor]:
    import torch

    made = {}
    for parameter, value in skeleton.load(group).items():
        # What a model keeps in float32 beside 16 bits stays so.
        kept = value.dtype == torch.float32 != skeleton.dtype
        if parameter in adapters.layers:
            merged = adapters.merge(parameter, value)
            made[parameter] = merged if kept else merged.to(dtype)
            rounding.add(value, merged, made[parameter])
        else:
            made[parameter] = value.to(dtype) if value.is_floating_point() and not kept else value
    return made


def _planned_bytes(tensor: StoredTensor) -> int:
    return tensor.elements * 2 if tensor.dtype in _FLOATS else tensor.size_bytes


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )
    path.chmod(0o644)  # safetensors writes 0600
    _sync(path)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    _sync(target)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
