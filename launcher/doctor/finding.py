"""Finding: what was looked at, what it is, and what to type where it is not well."""

from __future__ import annotations

from planner.base import validate
from planner.base.values import dataclass

OK = "ok"
LIMIT = "limit"
FAULT = "fault"
STATES = (OK, LIMIT, FAULT)
"""Well; not there, so that something cannot be done here, such as training without a GPU; or in the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at: its state, what was found, and a command that mends it (null: none)."""

    name: str
    state: str
    found: str
    to_type: str | None = None

    def __post_init__(self) -> None:
        validate.text("name", self.name)
        validate.choice("state", self.state, STATES)
