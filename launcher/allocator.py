"""How torch's allocator is set for a process, through its environment. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping

from planner.cuda_allocator import (
    EXPANDABLE,
    EXPANDABLE_SETTING,
    NATIVE,
    VARIABLE,
    VARIABLES,
    asked_allocator,
    machine_allocator,
)


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
