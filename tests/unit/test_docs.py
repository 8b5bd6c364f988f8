"""What the documentation says is so: commands exist, links lead somewhere, quotations are current."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launcher import cli
from planner.commands.program import Parser
from tests import write_docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_INLINE = re.compile(r"`((?:[\w-]+/)+[\w.-]*)`")
# Spelt in pieces, so that this file does not name what it looks for.
FOREIGN = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:wo" + "rk|fa" + r"rm|ro" + r"ot|home/\w+)/",
            "arti" + "factory",
            "nex" + "us3?/repository",
            "extra-" + "index-url",
            "index" + r"[-_]url\s*=",
            "find" + "-links",
        )
    ),
    re.IGNORECASE,
)


def commands() -> list[list[str]]:
    """The indented `plan ...`, `vramwise ...` and `make ...` lines of README.md."""
    lines = (
        line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")
    )
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [found for found in words if found and found[0] in ("plan", "vramwise", "make")]


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def parser_of(words: list[str]) -> tuple[Parser, list[str]]:
    if words[0] == "plan":
        return _parser(cli.COMMANDS["plan"].module), words[1:]
    sub = cli.SUBCOMMANDS.get((words[1], words[2])) if len(words) > 2 else None
    if sub is not None:
        return _parser(sub.module), words[3:]
    return _parser(cli.COMMANDS[words[1]].module), words[2:]


def _parser(module: str) -> Parser:
    parser = Parser(prog="vramwise")
    importlib.import_module(module).add_arguments(parser)
    return parser


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_readme_is_accepted(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    # What is piped elsewhere is not ours.
    words = words[: words.index("|")] if "|" in words else words
    parser, arguments = parser_of(words)
    parser.parse_args(arguments)


def test_the_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands() if words[0] == "vramwise"} | {"plan"}
    assert shown == set(cli.COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_pages_name_exist(page: Path) -> None:
    named = [path for path in _INLINE.findall(page.read_text()) if (ROOT / path.partition("/")[0]).is_dir()]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_quotations_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    out_of_date = write_docs.main(["--check"])
    assert not out_of_date, capsys.readouterr().err


def test_no_file_names_a_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert found == []
