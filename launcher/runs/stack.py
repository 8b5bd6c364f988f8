"""Which packages of the training stack are here, and in which versions. Light: none is imported."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from planner.base.errors import MissingExtraError
from planner.setup.stack import TRL

NEEDED = (*TRL.packages, "datasets", "psutil")
"""What no run can do without: reading data and sampling figures needs more than what decides memory."""
OPTIONAL = ("liger-kernel",)
"""What a setup may ask for beside it, and a record therefore names too."""


def require(what: str) -> None:
    """See that the training stack is installed, without loading it; `what` needs it.

    Raises:
        MissingExtraError: a package is not; the message names all that are not.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(what, ", ".join(missing))


def versions() -> tuple[tuple[str, str], ...]:
    """(package, version) of what decides memory and speed, as far as it is installed."""
    found = []
    for package in (*TRL.packages, *OPTIONAL):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)
