"""Data sets of the Hugging Face Hub: how one is named, fetched where it may be, and read from the cache.

`datasets` knows which files a configuration and a split consist of; what it has prepared in its cache is read
without the network. It is imported here alone in the planner, and only for such a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.base.errors import InputError, MissingExtraError, shorten

USUAL_SPLIT = "train"
"""What is trained where no split is named: TRL's own default (ScriptArguments.dataset_train_split)."""
_BEGINNINGS = ("hf://datasets/", "https://huggingface.co/datasets/")
_NAME = re.compile(
    r"(?P<repository>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:/(?P<config>\w[\w.+-]*))?(?::(?P<split>\w[\w.:%+\[\]-]*))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set as a person names it: `organisation/name`, `/configuration` and `:split` behind it."""

    repository: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"/{self.config}"
        return f"{self.repository}{config}" + ("" if self.split is None else f":{self.split}")


def hub_name(text: str) -> HubName | None:
    """The data set that a text may name; None where it is no such name, or something here has that name."""
    for beginning in _BEGINNINGS:
        text = text.removeprefix(beginning)
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists():
        return None
    return HubName(found["repository"], found["config"], found["split"])


def fetched(name: HubName, *, allow_network: bool) -> HubName:
    """The name with its configuration and split, once the data set is in the cache.

    Raises:
        InputError: it is not there and may not be fetched, or it cannot be; or it has no such split.
        MissingExtraError: the package datasets is not installed.
    """
    try:
        builder = _cached(name)
    except InputError:
        if not allow_network:
            raise
        _fetch(name)
        builder = _cached(name)
    split = name.split or _usual_split(name, list(builder.info.splits or ()))
    full = replace(name, config=builder.config.name, split=split)
    _rows_of(builder, full)
    return full


def cached_files(name: HubName) -> tuple[Path, ...]:
    """The files of the cache that hold a data set.

    Raises:
        InputError: as fetched without the network.
        MissingExtraError: as fetched.
    """
    return tuple(Path(each["filename"]) for each in _opened(name).cache_files)


def cached_batches(name: HubName, rows: int) -> Iterator[Any]:
    """Arrow tables of so many rows each, in the data set's order.

    Raises:
        InputError: as fetched without the network.
        MissingExtraError: as fetched.
    """
    yield from _opened(name).with_format("arrow").iter(batch_size=rows)


def _opened(name: HubName) -> Any:
    full = fetched(name, allow_network=False)
    return _rows_of(_cached(full), full)


def _cached(name: HubName) -> Any:
    """The builder of what datasets has prepared in its cache, which it reads without the network."""
    try:
        from datasets.packaged_modules.cache.cache import Cache
        from datasets.utils import logging
    except ImportError as error:
        raise MissingExtraError("reading a data set of the Hub", "the package datasets") from error
    logging.set_verbosity_error()  # It warns that it reads what it was asked to read.
    try:
        return Cache(
            repo_id=name.repository,
            dataset_name=name.repository.rpartition("/")[2],
            config_name=name.config,
            version="auto",
            hash="auto",
        )
    except (ValueError, OSError) as error:
        there = sorted(_line(error).partition("configurations in the cache: ")[2].split(", "))
        if any(there):
            raise InputError(
                f"{name}: has several configurations here ({', '.join(there)}); name one, as in "
                f"{name.repository}/{there[0]}"
            ) from error
        others = "" if name.config is None else _others_in_cache(name)
        raise InputError(
            f"{name}: neither a file here nor a data set in the Hugging Face cache{others}; --allow-download "
            "fetches it from the Hub"
        ) from error


def _others_in_cache(name: HubName) -> str:
    """Which other configuration there is, where there is one."""
    try:
        other = _cached(replace(name, config=None)).config.name
    except InputError:
        return ""
    return f", which has {name.repository}/{other}"


def _fetch(name: HubName) -> None:
    """Have datasets fetch and prepare a data set."""
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name}: not in the Hugging Face cache, and HF_HUB_OFFLINE is set")
    try:
        datasets.load_dataset_builder(name.repository, name.config).download_and_prepare()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{name}: cannot be fetched from the Hub: {_line(error)}") from error


def _usual_split(name: HubName, splits: list[str]) -> str:
    if USUAL_SPLIT in splits:
        return USUAL_SPLIT
    if len(splits) == 1:
        return splits[0]
    raise InputError(
        f"{name}: holds the splits {', '.join(splits) or 'none'}; name one, as in "
        f"{name}:{splits[0] if splits else USUAL_SPLIT}"
    )


def _rows_of(builder: Any, name: HubName) -> Any:
    try:
        return builder.as_dataset(split=name.split)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0], 200).strip("'\"")
