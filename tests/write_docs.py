"""Writes what the documentation quotes: `python -m tests.write_docs [--check] [PAGE ...]`.

`--check` tells whether it still holds; without pages it is all of them. docs/commands.md is the help of every
command, docs/knobs.md the rows of KNOBS. In README.md, the block after `<!-- output: COMMAND -->` is what the
command prints, or its first lines with `COMMAND | head -N`. docs/throughput.md has the table of
benchmarks/external_runs.py, docs/several-gpus.md that of benchmarks/scaling_table.py,
docs/claims.md that of benchmarks/guide_claims.py. What
benchmarks/memory_tables.py computes is in docs/memory-model.md and README.md after `<!-- memory: NAME -->`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from benchmarks import (
    cookbook,
    external_runs,
    guide_claims,
    memory_tables,
    published_outcomes,
    scaling_table,
    wanted_cards,
)
from launcher import cli
from planner.commands.knobs import default_of_option
from planner.commands.program import guarded
from planner.commands.schema import NAMES as SCHEMA_NAMES
from planner.gpus.catalog import gpu_catalog
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, CardLimit
from planner.setup.cuda_allocator import EXPANDABLE_SETTING, VARIABLE
from planner.setup.knob import METHODS, SECTIONS, Knob, plain
from planner.setup.knobs import KNOBS
from tests.man_page import man_page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COMMANDS = ROOT / "docs" / "commands.md"
KNOBS_PAGE = ROOT / "docs" / "knobs.md"
THROUGHPUT = ROOT / "docs" / "throughput.md"
MEMORY = ROOT / "docs" / "memory-model.md"
SEVERAL_GPUS = ROOT / "docs" / "several-gpus.md"
CLAIMS = ROOT / "docs" / "claims.md"
RECORDS = ROOT / "docs" / "records.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
INDEX = ROOT / "docs" / "index.md"
OTHER_TRAINERS = ROOT / "docs" / "other-trainers.md"
COOKBOOK = ROOT / "docs" / "cookbook.md"
MAN = ROOT / "docs" / "man" / "vramwise.1"
SCHEMAS = {name: ROOT / "docs" / "schema" / f"{name}.json" for name in SCHEMA_NAMES}
_NO_FOLDER = str(ROOT / "tests" / "no-such-folder")
PACKAGES = ("planner", "launcher", "vramwise")
_ROOMS = re.compile(r"(<!-- rooms -->\n).*?(<!-- end of rooms -->\n)", re.DOTALL)
_EXTERNAL = re.compile(r"(<!-- external runs -->\n).*?(<!-- end of external runs -->\n)", re.DOTALL)
_SCALING = re.compile(r"(<!-- scaling -->\n).*?(<!-- end of scaling -->\n)", re.DOTALL)
_CLAIMS = re.compile(r"(<!-- claims -->\n).*?(<!-- end of claims -->\n)", re.DOTALL)
_WANTED = re.compile(r"(<!-- wanted cards -->\n).*?(<!-- end of wanted cards -->\n)", re.DOTALL)
_COOKBOOK = re.compile(r"(<!-- cookbook -->\n).*?(<!-- end of cookbook -->\n)", re.DOTALL)
_OUTCOMES = re.compile(r"(<!-- outcomes -->\n).*?(<!-- end of outcomes -->\n)", re.DOTALL)
_OUTPUT = re.compile(r"(<!-- output: ([^|\n]+?)(?: \| head -(\d+))? -->\n```text\n)(.*?)(```\n)", re.DOTALL)
_PREAMBLE = "# Commands\n\nThe help of every command. `make docs` writes this file; a test compares it.\n"
_KNOBS_PREAMBLE = """# Knobs

Every key of a training setup but `model`: of a line that `vramwise estimate` reads, of a plan's JSON, and as
an option, `--lora-r` for `lora_r`. A default is the setup's; where `plan` takes another one, or chooses, a
column says so. What a card cannot run is refused in a line, and chosen by no plan. `make docs` writes this
file; a test compares it.
"""
LIMITS = (*CARD_LIMITS, BFLOAT16)
_CARDS_HEAD = """| key | value | compute capability | why | cards that cannot run it |
| --- | --- | --- | --- | --- |
"""
_KNOBS_HEAD = """| key | what it is | accepted | default | `plan` takes | conditions |
| --- | --- | --- | --- | --- | --- |
"""


def output_of(arguments: Sequence[str]) -> str:
    """What `vramwise ARGUMENTS` prints in 80 columns on a machine of which nothing is known."""
    quiet = {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "VRAMWISE_DATA_DIR": _NO_FOLDER,
        VARIABLE: EXPANDABLE_SETTING,
    }
    with mock.patch.dict(os.environ, quiet), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.suppress(SystemExit):
            guarded("vramwise", lambda: cli.run(list(arguments)))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def commands_page() -> str:
    """The text of docs/commands.md."""
    names = [[name] for name in cli.COMMANDS] + [list(words) for words in cli.SUBCOMMANDS]
    parts = [_PREAMBLE, _section("vramwise", ["--help"])]
    parts += [_section("vramwise " + " ".join(words), [*words, "--help"]) for words in names]
    return "\n".join(parts)


def _section(title: str, arguments: list[str]) -> str:
    return f"## {title}\n\n```text\n{output_of(arguments)}```\n"


def knobs_page(knobs: tuple[Knob, ...] = KNOBS) -> str:
    """The text of docs/knobs.md."""
    parts = [_KNOBS_PREAMBLE]
    for section in SECTIONS:
        lines = [_knob_line(knob) for knob in knobs if knob.section == section]
        parts.append(f"## {section}\n\n{_KNOBS_HEAD}{''.join(lines)}")
    limits = [limit for limit in LIMITS if limit.knob in {knob.name for knob in knobs}]
    parts.append(f"## Cards\n\n{_CARDS_HEAD}{''.join(_limit_line(limit) for limit in limits)}")
    return "\n".join(parts)


def _limit_line(limit: CardLimit) -> str:
    """Which cards of the catalog cannot run a knob's value."""
    cards = sorted(gpu.id for gpu in gpu_catalog() if gpu.compute_capability < limit.capability)
    capability = ".".join(map(str, limit.capability))
    why = f"{limit.why} {capability}" if limit.why.endswith("below") else limit.why
    cells = (f"`{limit.knob}`", f"`{plain(limit.value)}`", capability, why, ", ".join(cards))
    return f"| {' | '.join(cells)} |\n"


def _knob_line(knob: Knob) -> str:
    default = "required" if knob.required else f"`{plain(knob.default)}`"
    if knob.null:
        default += f": {knob.null}"
    of_plan = default_of_option(knob) if knob.unset != "{default}" else ""
    accepted = knob.accepted + (", null" if knob.null else "")
    cells = (f"`{knob.name}`", knob.help, accepted, default, of_plan, _conditions(knob))
    return f"| {' | '.join(cells)} |\n"


def _conditions(knob: Knob) -> str:
    """What values of a knob need of other knobs, in words."""
    needs = [] if knob.methods == METHODS else [f"method {' or '.join(knob.methods)}"]
    needs += [need.told for need in knob.needs]
    said = []
    if needs and knob.kept:
        said.append(f"used with {' and '.join(needs)}")
    elif needs:
        free = " and ".join(f"`{plain(value)}`" for value in (knob.default, *knob.free))
        said.append(f"all but {free} need {' and '.join(needs)}")
    said += [
        f"`{plain(limit.value)}` needs compute capability {'.'.join(map(str, limit.capability))}"
        for limit in LIMITS
        if limit.knob == knob.name
    ]
    return "; ".join(said)


def readme(text: str) -> str:
    """README.md with its quotations as they are now."""
    return memory_tables.written(printed(text))


def printed(text: str) -> str:
    """A page with the outputs that it quotes as they are now."""
    return _OUTPUT.sub(lambda match: match[1] + _printed(match[2], match[3]) + match[5], text)


def _printed(command: str, lines: str | None) -> str:
    words = shlex.split(command)
    printed = output_of(words[1:] if words[0] == "vramwise" else words)
    return printed if lines is None else "".join(printed.splitlines(keepends=True)[: int(lines)])


def architecture(text: str) -> str:
    """docs/architecture.md with the rooms as they are now."""
    return _ROOMS.sub(lambda match: f"{match[1]}```text\n{rooms()}```\n{match[2]}", text)


def rooms(root: Path = ROOT) -> str:
    """Every package's folder with what it says of itself, and its modules below."""
    folders = sorted(path.parent for package in PACKAGES for path in (root / package).rglob("__init__.py"))
    folders.sort(key=lambda folder: (PACKAGES.index(folder.relative_to(root).parts[0]), folder))
    lines = []
    for folder in folders:
        parts = folder.relative_to(root).parts
        indent = "  " * (len(parts) - 1)
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"{indent}{parts[-1] + '/':<{20 - len(indent)}}{said.splitlines()[0]}")
        modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        lines += textwrap.wrap(
            " ".join(modules), 92, initial_indent=indent + "    ", subsequent_indent=indent + "    "
        )
    return "\n".join(lines) + "\n"


def throughput(text: str) -> str:
    """docs/throughput.md with the forecasts of others' runs as they are now."""
    return _EXTERNAL.sub(lambda match: match[1] + external_runs.table() + match[2], text)


def several_gpus(text: str) -> str:
    """docs/several-gpus.md with the forecasts of more GPUs as they are now."""
    return _SCALING.sub(lambda match: match[1] + scaling_table.table() + match[2], text)


def claims(text: str) -> str:
    """docs/claims.md with the verdicts on what guides state as they are now."""
    return _CLAIMS.sub(lambda match: match[1] + guide_claims.table() + match[2], text)


def records(text: str) -> str:
    """docs/records.md with the cards that no record is of as they are now."""
    return _WANTED.sub(lambda match: match[1] + wanted_cards.table() + match[2], text)


def cards(text: str) -> str:
    """docs/cookbook.md with the plans for each size of card as they are now."""
    with mock.patch.dict(os.environ, {VARIABLE: EXPANDABLE_SETTING, "VRAMWISE_DATA_DIR": _NO_FOLDER}):
        return _COOKBOOK.sub(lambda match: match[1] + cookbook.table() + match[2], text)


def outcomes(text: str) -> str:
    """docs/other-trainers.md with what is said of configs whose outcome is published as it is now."""
    with mock.patch.dict(os.environ, {VARIABLE: EXPANDABLE_SETTING, "VRAMWISE_DATA_DIR": _NO_FOLDER}):
        return _OUTCOMES.sub(lambda match: match[1] + published_outcomes.table() + match[2], text)


def main(arguments: Sequence[str]) -> int:
    """Write or check; returns 1 when something is out of date."""
    written: dict[Path, Callable[[str], str]] = {
        COMMANDS: lambda _: commands_page(),
        KNOBS_PAGE: lambda _: knobs_page(),
        README: readme,
        THROUGHPUT: throughput,
        SEVERAL_GPUS: several_gpus,
        CLAIMS: claims,
        RECORDS: records,
        ARCHITECTURE: architecture,
        MEMORY: memory_tables.written,
        INDEX: printed,
        COOKBOOK: cards,
        OTHER_TRAINERS: outcomes,
        MAN: lambda _: man_page(),
        **{path: lambda _, name=name: output_of(["schema", name]) for name, path in SCHEMAS.items()},
    }
    named = {ROOT / page for page in arguments if page != "--check"}
    if named - written.keys():
        print(f"only {', '.join(path.name for path in written)} are written", file=sys.stderr)
        return 2
    before = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in written}
    wanted = {path: write(before[path]) for path, write in written.items() if not named or path in named}
    old = [path for path, text in wanted.items() if before[path] != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} is out of date: make docs", file=sys.stderr)
        if "--check" not in arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
    return int(bool(old) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
