"""How torch's allocator is set for a process, through its environment. Light: no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, MutableMapping

from planner.setup.cuda_allocator import (
    EXPANDABLE,
    EXPANDABLE_SETTING,
    NATIVE,
    VARIABLE,
    VARIABLES,
    asked_allocator,
    machine_allocator,
)

_DRIVER = "libcuda.so.1"
_VIRTUAL_MEMORY = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED (cuda.h)."""


def allocator_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add for a run. What a person has set stays."""
    if asked_allocator(environment) is not None or machine_allocator() == NATIVE:
        return {}
    return {VARIABLE: EXPANDABLE_SETTING}


def measuring_environment(environment: Mapping[str, str], *, allocator: str | None = None) -> dict[str, str]:
    """The environment of a measuring process: with the given allocator, else as the launcher would set it on
    this machine, whatever a person has set.
    """
    clean = {name: value for name, value in environment.items() if name not in VARIABLES}
    if (allocator or machine_allocator()) == EXPANDABLE:
        clean[VARIABLE] = EXPANDABLE_SETTING
    return clean


def process_allocator(environment: Mapping[str, str]) -> str:
    """The allocator of a process with this environment."""
    return asked_allocator(environment) or NATIVE


def driver_maps_memory() -> bool:
    """Whether the first visible GPU's driver can map memory, which expandable segments need; those of some
    virtual GPUs cannot. Where the driver does not say, it is taken to.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return True
    device, supported = ctypes.c_int(), ctypes.c_int(1)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return True
    if driver.cuDeviceGetAttribute(ctypes.byref(supported), _VIRTUAL_MEMORY, device):
        return True
    return bool(supported.value)


def fall_back(environment: MutableMapping[str, str]) -> str | None:
    """Before torch is imported: leave expandable segments where the driver cannot have them; returns a
    sentence that says so.
    """
    if process_allocator(environment) == NATIVE or driver_maps_memory():
        return None
    for name in VARIABLES:
        environment.pop(name, None)
    return "this GPU's driver cannot map memory: torch's default allocator reserves more than the plan says"
