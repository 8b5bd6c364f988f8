"""Describe models outside the catalog, each once, in a child process: torch stays out of this one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from launcher.models.inspect import inspect_in_child
from planner.models.spec import ModelSpec


def inspector(config: Mapping[str, Any], *, model_id: str, hub_id: str) -> ModelSpec:
    """The planner's Inspector: takes seconds, so made for a worker thread.

    Raises:
        InputError: the config is refused or describes a model that the recipes do not understand.
        MissingExtraError: the training stack is not installed.
    """
    return _inspect(json.dumps(config, sort_keys=True), model_id, hub_id)


@functools.lru_cache(maxsize=16)
def _inspect(config: str, model_id: str, hub_id: str) -> ModelSpec:
    return inspect_in_child(json.loads(config), model_id=model_id, hub_id=hub_id)
