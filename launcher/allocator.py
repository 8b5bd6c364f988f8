"""How torch's allocator is set for a run, through its process's environment. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


def allocator_environment(environment: Mapping[str, str], *, lengths_vary: bool) -> dict[str, str]:
    """The variables to add for a run.

    Batches of many lengths leave holes between blocks of many sizes: Llama-3.1-8B on padded chats had 13.7
    GiB allocated and reserved 16.8 (run 20261122-486ef6addc62), with expandable segments 14.6
    (20261122-cb9a5e494749). Batches of one shape keep torch's default, whose segments
    planner/memory/allocator.py replays. What a person has set stays.
    """
    if not lengths_vary or VARIABLE in environment:
        return {}
    return {VARIABLE: EXPANDABLE}


def measuring_environment(environment: Mapping[str, str], *, lengths_vary: bool) -> dict[str, str]:
    """The environment of a measuring process: as the launcher would set it, whatever a person has set."""
    clean = {name: value for name, value in environment.items() if name != VARIABLE}
    return {**clean, **allocator_environment(clean, lengths_vary=lengths_vary)}


def is_expandable(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for expandable segments."""
    return EXPANDABLE in environment.get(VARIABLE, "").replace(" ", "").split(",")
