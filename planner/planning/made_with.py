"""What a plan is made with: the releases that its figures may depend on, as far as they are here."""

from __future__ import annotations

import dataclasses

from planner.answers.plan import Plan, Release
from planner.setup.stack import TRL


def installed() -> tuple[Release, ...]:
    """This program and the packages of the training stack; a package that is not installed is left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("vramwise", *TRL.packages):
        try:
            found.append(Release(name=name, version=version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def to_keep(plan: Plan) -> Plan:
    """The plan as it is written to a file: with what it was made with, unless it says so already."""
    return plan if plan.made_with else dataclasses.replace(plan, made_with=installed())
