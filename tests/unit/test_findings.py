"""The form of findings: they are listed, can be run, say what they are about and pin all that they install.

What they find is not tested here: that installs packages from a network.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

FINDINGS = Path(__file__).resolve().parents[2] / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))
FIELDS = ("Finding", "Versions", "Expected", "Seen")
_ROW = re.compile(r"^\| \[([\w.-]+)\]\(([\w.-]+)\) \| (.+?) \| (.+) \|$", re.MULTILINE)
_PINNED = re.compile(r"[A-Za-z0-9_.-]+==\d[\w.]*")


def header(script: Path) -> dict[str, str]:
    """The fields of a script's first comment; a field's later lines are indented."""
    fields: dict[str, str] = {}
    name = ""
    for line in script.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        if field := re.match(r"# (\w+): +(.*)", line):
            name, text = field.groups()
        else:
            text = line.removeprefix("#").strip()
        fields[name] = f"{fields.get(name, '')} {text}".strip()
    return fields


def installed(script: Path) -> list[str]:
    """What a script asks pip for, in its words."""
    lines = script.read_text().replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if "pip install" in line]
    asked = [line[line.index("install") + 1 :] for line in words]
    return [word for line in asked for word in line if word != "--quiet"]


def versions(text: str) -> set[str]:
    """`torch 2.13.0, peft 0.21.2` as what pip is asked for."""
    return {part.strip().replace(" ", "==") for part in text.split(",")}


def rows() -> list[tuple[str, ...]]:
    return [row.groups() for row in _ROW.finditer((FINDINGS / "README.md").read_text())]


def test_the_table_lists_every_script_once_and_nothing_else() -> None:
    assert SCRIPTS
    assert [name for name, *_ in rows()] == [script.name for script in SCRIPTS]
    assert all(name == link for name, link, *_ in rows())
    assert {entry.name for entry in FINDINGS.iterdir()} == {"README.md", *(s.name for s in SCRIPTS)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
class TestEachFinding:
    def test_can_be_run(self, script: Path) -> None:
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/usr/bin/env bash\n")

    def test_says_what_it_is_about(self, script: Path) -> None:
        assert tuple(header(script)) == FIELDS
        assert all(header(script).values())

    def test_pins_every_package_that_it_installs(self, script: Path) -> None:
        assert installed(script)
        assert [word for word in installed(script) if not _PINNED.fullmatch(word)] == []

    def test_names_the_versions_that_it_installs_in_its_header_and_in_the_table(self, script: Path) -> None:
        tabled = next(packages for name, _, packages, _ in rows() if name == script.name)
        assert versions(header(script)["Versions"]) == set(installed(script)) == versions(tabled)

    def test_leaves_nothing_behind_and_stops_at_the_first_failure(self, script: Path) -> None:
        text = script.read_text()
        assert "set -euo pipefail\nwork=$(mktemp -d)\ntrap 'rm -rf \"$work\"' EXIT\n" in text

    def test_ends_in_a_verdict_of_either_kind(self, script: Path) -> None:
        text = script.read_text()
        assert re.search(
            r'print\("ok: .+"\)\nelse:\n    print\("changed: .+"\)\n    sys\.exit\(1\)\nEOF\n$', text
        )
        assert len(text.splitlines()) < 100
