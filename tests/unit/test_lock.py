"""constraints.txt: every package of the tested stack has one release there."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "constraints.txt"


def locked() -> list[Requirement]:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [Requirement(line) for line in lines]


def asked_for() -> list[Requirement]:
    """What the project, its extras and its developers need, as pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["project"]["dependencies"],
        *(text for extra in project["project"]["optional-dependencies"].values() for text in extra),
        *project["dependency-groups"]["dev"],
    ]
    return [Requirement(text) for text in wanted]


def needed(requirement: Requirement) -> list[Requirement]:
    """What an installed package needs here, by the extras that are asked for.

    CUDA's torch names the releases of NVIDIA's packages itself.
    """
    lines = metadata.requires(requirement.name) or []
    found = [Requirement(line) for line in lines]
    pins = requirement.name == "torch"
    return [
        one
        for one in found
        if not (pins and str(one.specifier).startswith("=="))
        and (
            one.marker is None
            or any(one.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras))
        )
    ]


def test_each_line_pins_one_release_of_another_package() -> None:
    pins = locked()
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(set(names)) == len(names)
    assert names == sorted(names)


def test_every_package_that_is_installed_for_the_tests_is_locked() -> None:
    names = {canonicalize_name(pin.name) for pin in locked()}
    left, seen = asked_for(), set()
    while left:
        one = left.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        try:
            left += needed(one)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{one.name} is not installed")
    missing = {canonicalize_name(Requirement(text).name) for text in seen} - names
    assert missing == set()


def test_what_pyproject_asks_for_allows_the_locked_releases() -> None:
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in locked()}
    for one in asked_for():
        assert one.specifier.contains(pins[canonicalize_name(one.name)], prereleases=True), one
