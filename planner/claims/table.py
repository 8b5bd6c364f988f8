"""Reading claims from a table: CSV, or the first table of a Markdown page, a claim a row.

Columns are `claim` (a sentence), `model`, `gpu`, any key of a training setup, and what is stated: `memory`,
`weights`, `speed`, `time`, `examples`, `epochs`. Empty cells say nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from planner.base.errors import FieldError, InputError, shorten
from planner.claims.claim import Claim
from planner.claims.sentence import read_claim
from planner.setup.knob import KnobValue
from planner.setup.knobs import KNOBS

MARKDOWN = (".md", ".markdown")
CSV = (".csv",)
MAX_BYTES = 2**22
_KNOBS = {knob.name: knob for knob in KNOBS}
_STATED: dict[str, str] = {
    "weights": "weights {}",
    "memory": "{}",
    "speed": "{}",
    "time": "{}",
    "examples": "{} examples",
    "epochs": "{} epochs",
}
"""Columns that are stated, as a sentence says them."""
COLUMNS = ("claim", "model", "gpu", *_STATED)
_SEPARATOR = re.compile(r":?-{2,}:?")
_SWITCH = {"true": True, "yes": True, "false": False, "no": False}


def is_table(name: str) -> bool:
    """Whether an argument names a file with a table, and is no sentence."""
    return name.lower().endswith(CSV + MARKDOWN)


def read_table(
    path: Path, *, knobs: dict[str, KnobValue], model: str | None, gpu: str | None
) -> Iterator[Claim]:
    """Read the claims of a file in order; a row's own model, card and knobs win over those given.

    Raises:
        InputError: the file cannot be read, has no table or a column that is not known, or a row is no claim;
            the row is named.
    """
    lines = _read(path).splitlines()
    rows = list(csv.reader(lines)) if path.suffix.lower() in CSV else list(_markdown(lines))
    if len(rows) < 2:
        raise InputError(f"{shorten(str(path))} has no table with a head and rows")
    head = [cell.strip().lower() for cell in rows[0]]
    for name in head:
        if name not in COLUMNS and name not in _KNOBS:
            accepted = ", ".join((*COLUMNS, "a key of a training setup"))
            raise FieldError("column", name, accepted)
    for number, row in enumerate(rows[1:], 1):
        if not any(cell.strip() for cell in row):
            continue
        try:
            yield _claim(dict(zip(head, row, strict=True)), knobs, model, gpu)
        except ValueError as error:
            raise InputError(f"row {number}: {len(row)} cells, the head has {len(head)}") from error
        except InputError as error:
            raise InputError(f"row {number}: {error}") from error


def _claim(row: dict[str, str], knobs: dict[str, KnobValue], model: str | None, gpu: str | None) -> Claim:
    cells = {name: " ".join(cell.split()) for name, cell in row.items() if cell.strip()}
    own = {name: _value(name, cell) for name, cell in cells.items() if name in _KNOBS}
    said = [text.format(cells[name]) for name, text in _STATED.items() if name in cells]
    stated = "; ".join([cells["claim"], *said] if "claim" in cells else said)
    shown = cells.get("claim") or "; ".join([cells.get("model", model or ""), *said])
    found = read_claim(
        stated or shown, knobs=knobs | own, model=cells.get("model", model), gpu=cells.get("gpu", gpu)
    )
    return Claim(
        text=shown,
        model=found.model,
        gpu=found.gpu,
        knobs=found.knobs,
        figures=found.figures,
        tokens=found.tokens,
        unread=found.unread,
    )


def _value(name: str, cell: str) -> KnobValue:
    """A knob's value; what it accepts is checked when the setup is made."""
    kind = _KNOBS[name].kind
    try:
        if kind == "int":
            return int(cell.replace(",", ""))
        if kind == "float":
            return float(cell)
        if kind == "bool":
            return _SWITCH[cell.lower()]
        if kind == "indices":
            return tuple(int(part) for part in cell.split(","))
    except (ValueError, KeyError) as error:
        raise FieldError(name, cell, _KNOBS[name].accepted) from error
    if kind == "names" and cell not in _KNOBS[name].choices:
        return tuple(part.strip() for part in cell.split(","))
    return cell


def _markdown(lines: Sequence[str]) -> Iterator[list[str]]:
    """Cells of the first table, without the line below its head."""
    inside = False
    for line in lines:
        text = line.strip()
        if not text.startswith("|"):
            if inside:
                return
            continue
        inside = True
        cells = [cell.replace("`", "").strip() for cell in text.strip("|").split("|")]
        if not all(_SEPARATOR.fullmatch(cell) for cell in cells):
            yield cells


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{shorten(str(path))} is larger than {MAX_BYTES:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{shorten(str(path))} cannot be read ({reason})") from error
