"""Files of coefficients: the user's own, then those that are shipped."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from planner.base.data_files import PROFILES, read_json, user_data_dir
from planner.base.errors import InputError
from planner.memory.measured.coefficients import Coefficients
from planner.setup.cuda_allocator import EXPANDABLE


def calibration_files() -> tuple[Path, ...]:
    """Calibration files: the user's own first, then the shipped ones."""
    folders = (user_data_dir() / "calibration", PROFILES / "calibration")
    return tuple(path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json")))


def coefficients_name(gpu_name: str, allocator: str) -> str:
    """Name of the file with a GPU's coefficients for an allocator."""
    return f"{gpu_name}.json" if allocator == EXPANDABLE else f"{gpu_name}-{allocator}.json"


@lru_cache(maxsize=16)
def coefficients_for(gpu_name: str | None, allocator: str) -> Coefficients:
    """The coefficients whose environment matches best: this GPU's own, the user's before the shipped, and
    only those of runs with the same allocator.

    Raises:
        InputError: a calibration file cannot be read, or there is none.
    """
    fallback: Coefficients | None = None
    for path in calibration_files():
        found = read_json(path, Coefficients.from_dict)
        if found.allocator != allocator:
            continue
        if gpu_name is not None and found.gpu == gpu_name:
            return found
        if path.is_relative_to(PROFILES):
            fallback = fallback or found
    if fallback is None:
        raise InputError(f"no calibration file for {allocator} under {PROFILES / 'calibration'}")
    return fallback
