"""Trackers that a run may tell its figures beside its own files, offline unless uploading is asked for.

Light: none is imported. transformers has a callback for each (integrations/integration_utils.py); these are
the variables that those and the packages read.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from planner.base import validate
from planner.base.errors import FieldError, MissingExtraError

TRACKERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
)
"""Each tracker with the packages of which one is needed."""
PROJECT = "vramwise"
ONLINE_VARIABLES = ("WANDB_API_KEY", "TRACKIO_SPACE_ID")
"""What an offline tracker has no use for, and so does not get to see: a key, and where to upload."""


def checked(names: object) -> tuple[str, ...]:
    """Names of trackers, each once.

    Raises:
        FieldError: something else.
    """
    if not isinstance(names, list | tuple):
        raise FieldError("track", names, "a list of " + ", ".join(TRACKERS))
    found = tuple(validate.choice("track", name, TRACKERS) for name in names)
    if len(set(found)) < len(found):
        raise FieldError("track", found, "each tracker once")
    return found


def require(names: Sequence[str]) -> None:
    """See that the packages are installed, without loading them.

    Raises:
        MissingExtraError: one is not; the line that installs it is named.
    """
    for name in names:
        packages = TRACKERS[name]
        if all(importlib.util.find_spec(package) is None for package in packages):
            raise MissingExtraError(f"--track {name}", f"the package {packages[0]}", packages[0])


def environment(names: Sequence[str], folder: Path, *, allow_upload: bool) -> dict[str, str]:
    """What trackers read: everything goes into `folder`, and nowhere else unless it may be uploaded.

    A project that the person has named stays.
    """
    found: dict[str, str] = {}
    if "tensorboard" in names:
        found["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if "wandb" in names:
        found |= {"WANDB_DIR": str(folder), "WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false"}
        found |= {"WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true", "WANDB_CONSOLE": "off"}
        found |= {} if allow_upload else {"WANDB_MODE": "offline"}
    if "trackio" in names:
        found["TRACKIO_DIR"] = str(folder / "trackio")
    return found


def prepare(names: Sequence[str], folder: Path, *, allow_upload: bool) -> None:
    """Set what the packages read when they are imported, and make the folder that they write into.

    Raises:
        MissingExtraError: a package is not installed.
        OSError: the folder cannot be made.
    """
    if not names:
        return
    require(names)
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.update(environment(names, folder, allow_upload=allow_upload))
    if not allow_upload:
        for name in ONLINE_VARIABLES:
            os.environ.pop(name, None)
