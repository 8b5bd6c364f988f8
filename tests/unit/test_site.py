"""The documentation as a site: every page is in it, and it builds strictly."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav: Any) -> Iterator[str]:
    """The files of a navigation."""
    for entry in nav:
        for inside in entry.values():
            yield from [inside] if isinstance(inside, str) else pages(inside)


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(pages(CONFIG["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))


def built(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("zensical")
    if not program.exists():
        pytest.skip("zensical is not installed (dependency group docs)")
    return subprocess.run(
        [program, "build", "--strict", "--clean"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_site_builds_strictly_and_a_link_that_leads_nowhere_fails(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = built(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in pages(CONFIG["nav"]):
        made = (
            tmp_path
            / "site"
            / ("index.html" if page == "index.md" else f"{page.removesuffix('.md')}/index.html")
        )
        assert made.is_file(), page
    with (tmp_path / "docs" / "index.md").open("a") as file:
        file.write("\n[nowhere](no-such-page.md)\n")
    assert built(tmp_path).returncode != 0


def test_the_wheel_installs_the_man_page_that_tells_every_command() -> None:
    from launcher.cli import COMMANDS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ((page, place),) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"].items()
    assert place == "share/man/man1/vramwise.1"
    text = (ROOT / page).read_text()
    assert text.startswith(".TH VRAMWISE")
    assert [name for name in COMMANDS if f"vramwise {name}\\fR" not in text.replace("\\-", "-")] == []
