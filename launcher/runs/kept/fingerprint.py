"""What a run was started on: hashes of its data and model, versions, and its job. Light: no torch.

A resumed run is the uninterrupted one only on the same; what differs is named. Weights of more than
WHOLE_BYTES are not hashed whole, which would take longer than to load them: their size, their header (names,
shapes and places of all tensors) and SAMPLES blocks spread evenly are. A change elsewhere is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs import stack
from launcher.runs.folder import RunFolder
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import write_atomically
from planner.base.errors import InputError
from planner.base.json_codec import decode_fields, encode_fields

FINGERPRINT_VERSION = 1
WHOLE_BYTES = 1 << 30
SAMPLES, SAMPLE_BYTES = 64, 1 << 20
MOST_HEADER_BYTES = 100_000_000
"""safetensors' own limit (safetensors/src/tensor.rs, MAX_HEADER_SIZE)."""
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What transformers reads of a model's folder: configs, weights, tokenizer and chat template."""
KINDS = ("data", "model", "versions")
"""What a person may accept as changed. A changed job is not among them: most of it a checkpoint overrides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileMark:
    """One file: its name, its bytes, and the hash of what of it is hashed."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a run was started on; `job` is its JSON, as text."""

    data: tuple[FileMark, ...]
    model: tuple[FileMark, ...]
    versions: tuple[tuple[str, str], ...]
    job: str
    version: int = FINGERPRINT_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not as it was: "data", "model", "versions" or "job", and what, in words."""

    kind: str
    text: str


def take(job: TrainingJob) -> Fingerprint:
    """The fingerprint of a job as its files are now; of a file that is not there, none.

    Raises:
        OSError: a file is there and cannot be read.
    """
    evaluation = [] if job.eval_data_path is None else _data("evaluation data", Path(job.eval_data_path))
    return Fingerprint(
        data=(*_data("training data", Path(job.data_path)), *evaluation),
        model=tuple(_mark(path, path.name) for path in _model_files(job.model_source)),
        versions=(("python", platform.python_version()), *stack.versions()),
        job=json.dumps(job.to_dict(), sort_keys=True),
    )


def write(folder: RunFolder, fingerprint: Fingerprint) -> None:
    """Write it into the run folder."""
    write_atomically(folder.fingerprint, json.dumps(encode_fields(fingerprint), indent=1) + "\n")


def read(folder: RunFolder) -> Fingerprint | None:
    """That of the run folder; None where the run was killed before there was one.

    Raises:
        InputError: the file holds something else.
    """
    try:
        return decode_fields(Fingerprint, json.loads(folder.fingerprint.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder.fingerprint}: not a readable fingerprint ({error})") from error


def differences(before: Fingerprint, now: Fingerprint) -> list[Difference]:
    """All that is not as it was."""
    return [
        *(Difference(kind="data", text=text) for text in _files(before.data, now.data)),
        *(Difference(kind="model", text=text) for text in _files(before.model, now.model)),
        *(
            Difference(kind="versions", text=text)
            for text in _changed(dict(before.versions), dict(now.versions))
        ),
        *(
            Difference(kind="job", text=text)
            for text in _changed(_flat(json.loads(before.job)), _flat(json.loads(now.job)))
        ),
    ]


def _data(name: str, path: Path) -> list[FileMark]:
    """A data file by what it is for, so that it may lie elsewhere; all files of a folder."""
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file())
        return [_mark(one, f"{name} {one.relative_to(path)}") for one in files]
    return [_mark(path, name)] if path.is_file() else []


def _model_files(source: str) -> list[Path]:
    """Files of a folder, or of a Hub id in the Hugging Face cache."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source, "config.json")
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def _mark(path: Path, name: str) -> FileMark:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return FileMark(
                name=name, size_bytes=size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
            )
        digest = hashlib.sha256()
        # A safetensors file begins with the length of its header, eight bytes little-endian.
        digest.update(file.read(min(int.from_bytes(file.read(8), "little"), MOST_HEADER_BYTES)))
        for number in range(SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return FileMark(name=name, size_bytes=size, sha256=digest.hexdigest())


def _files(before: Sequence[FileMark], now: Sequence[FileMark]) -> Iterator[str]:
    old, new = ({mark.name: mark for mark in marks} for marks in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"{name} is gone"
        elif name not in old:
            yield f"{name} is new"
        elif old[name] != new[name]:
            sizes = f"{old[name].size_bytes:,} bytes before, {new[name].size_bytes:,} now"
            yield f"{name} has changed ({sizes})"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            yield f"{name} {'none' if old is None else old} before, {'none' if new is None else new} now"


def _flat(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job's fields, those of its setup among them, without what says where things lie."""
    places = ("data_path", "eval_data_path", "model_source")
    rest = {name: value for name, value in job.items() if name != "setup" and name not in places}
    setup = job.get("setup")
    return {**(setup if isinstance(setup, Mapping) else {}), **rest}
