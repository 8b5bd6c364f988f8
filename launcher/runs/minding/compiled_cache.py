"""Where torch keeps what it has compiled, so that a later run need not wait for it again. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping

from planner.base.data_files import user_cache_dir

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""torch/_inductor/runtime/cache_dir_utils.py; its default is a folder of /tmp, which a restart empties."""


def cache_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable to add for a run. What a person has set stays.

    torch's own keys tell versions, card and settings apart; a layer takes a few megabytes.
    """
    return {} if environment.get(VARIABLE) else {VARIABLE: str(user_cache_dir() / "compiled")}
