"""What the catalog's cards are called where they are rented."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache

from planner.base.data_files import PROFILES

RENTED_NAMES = PROFILES / "job_gpus.toml"


@cache
def rented_names() -> Mapping[str, Mapping[str, str]]:
    """A service's name of a card, by the card's id and the service."""
    found: dict[str, dict[str, str]] = tomllib.loads(RENTED_NAMES.read_text(encoding="utf-8"))
    return found
