"""Which of torch's CUDA allocators a training process gets: expandable segments wherever they work.

A segment that grows leaves no holes between segments, so reserved memory follows allocated memory closely.
They do not work on Windows (torch ignores the setting, c10/cuda/CUDAAllocatorConfig.h) nor in its Linux
subsystem, where mapping memory fails in the driver (pytorch/pytorch#192330).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

NATIVE = "native"
"""torch's default: a segment of fixed size for each request that finds no room."""
EXPANDABLE = "expandable_segments"
ALLOCATORS = (EXPANDABLE, NATIVE)

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
VARIABLES = (VARIABLE, "PYTORCH_ALLOC_CONF")
"""Names that torch reads: the first that is set counts, be it empty (c10/core/AllocatorConfig.cpp)."""
EXPANDABLE_SETTING = "expandable_segments:True"


def asked_allocator(environment: Mapping[str, str], system: str = sys.platform) -> str | None:
    """The allocator that the environment makes torch use; None where it says nothing.

    Of several settings the last counts. On Windows torch warns of the setting and ignores it
    (c10/cuda/CUDAAllocatorConfig.h).
    """
    asked = next((environment[name] for name in VARIABLES if name in environment), None)
    if asked is None:
        return None
    parts = "".join(asked.split()).split(",")
    settings = [part for part in parts if part.partition(":")[0] == "expandable_segments"]
    expandable = settings[-1:] == [EXPANDABLE_SETTING] and not _is_windows(system)
    return EXPANDABLE if expandable else NATIVE


def machine_allocator(system: str = sys.platform, release: str | None = None) -> str:
    """The allocator that suits an operating system: `system` as sys.platform, `release` its kernel's (null:
    this machine's).
    """
    if release is None:
        release = os.uname().release if hasattr(os, "uname") else ""
    return NATIVE if _is_windows(system) or "microsoft" in release.lower() else EXPANDABLE


def _is_windows(system: str) -> bool:
    return system in ("win32", "cygwin")


def planned_allocator() -> str:
    """The allocator of a run that is started from here: what a person has set, else what suits the machine.

    A machine without an NVIDIA GPU plans for another one, taken to be Linux unless it is Windows itself.
    """
    return asked_allocator(os.environ) or machine_allocator()
