"""Which of torch's CUDA allocators a training process gets: expandable segments wherever they work.

A segment that grows leaves no holes between segments, so reserved memory follows allocated memory closely.
They do not work on Windows (torch ignores the setting, c10/cuda/CUDAAllocatorConfig.cpp) nor in its Linux
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
"""Both names that torch reads (torch 2.11, c10/core/AllocatorConfig.h)."""
EXPANDABLE_SETTING = "expandable_segments:True"


def asked_allocator(environment: Mapping[str, str]) -> str | None:
    """The allocator that the environment asks torch for; None where it says nothing."""
    settings = [environment[name] for name in VARIABLES if name in environment]
    if not settings:
        return None
    parts = [part for setting in settings for part in setting.replace(" ", "").split(",")]
    return EXPANDABLE if EXPANDABLE_SETTING in parts else NATIVE


def machine_allocator(system: str = sys.platform, release: str | None = None) -> str:
    """The allocator that suits an operating system: `system` as sys.platform, `release` its kernel's (null:
    this machine's).
    """
    if release is None:
        release = os.uname().release if hasattr(os, "uname") else ""
    windows = system in ("win32", "cygwin") or "microsoft" in release.lower()
    return NATIVE if windows else EXPANDABLE


def planned_allocator() -> str:
    """The allocator of a run that is started from here: what a person has set, else what suits the machine.

    A machine without an NVIDIA GPU plans for another one, taken to be Linux unless it is Windows itself.
    """
    return asked_allocator(os.environ) or machine_allocator()
