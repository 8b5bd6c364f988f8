"""Describe a model outside the catalog with an installed package that can: the group vramwise.inspectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner.base.errors import MissingExtraError, shorten

if TYPE_CHECKING:
    from planner.models.catalog import Inspector
    from planner.models.spec import ModelSpec

GROUP = "vramwise.inspectors"


def installed_inspector(config: Mapping[str, Any], *, model_id: str, hub_id: str) -> ModelSpec:
    """The Inspector that is looked up only when a model needs it.

    Raises:
        InputError: the config is refused or describes a model that is not understood.
        MissingExtraError: nothing that describes models is installed.
    """
    # Slow to import, and needed for unknown models only.
    from importlib.metadata import entry_points

    found = sorted(entry_points(group=GROUP), key=lambda one: one.name)
    if not found:
        raise MissingExtraError(f"describing {shorten(hub_id)}", "torch and transformers")
    inspector: Inspector = found[0].load()
    return inspector(config, model_id=model_id, hub_id=hub_id)
