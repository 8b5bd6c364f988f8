"""Look at what a training needs of this machine: driver, cards, torch's build, packages, disk, what to type.

Changes nothing and prints no key, no name of a person or machine: its output can be sent with a report. Exit
code 1 where something is in the way of a training that could run here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.doctor import checks
from launcher.doctor.finding import FAULT, Finding
from launcher.doctor.imported import ask
from planner.base.errors import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `doctor`."""
    parser.add_argument("--runs", type=Path, help="where run folders are (default: runs in your data folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Look and print."""
    findings = look(args.runs)
    if args.json:
        from planner.base.json_codec import encode

        values = {"version": 1, "findings": [encode(one) for one in findings], "next": next_command(findings)}
        json.dump(values, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        _show(findings)
    return ExitCode.FAILED if any(one.state == FAULT for one in findings) else ExitCode.OK


def look(runs: Path | None) -> tuple[Finding, ...]:
    """All findings, in the order in which a person mends them."""
    found = [checks.program()]
    driver, gpus = checks.driver()
    found += [driver, *checks.cards(gpus)]
    packages = list(checks.packages())
    found += packages
    if any("torch" in one.found.partition("not installed")[2] for one in packages):
        return (*found, *checks.folders(runs))
    imported = ask()
    found.append(checks.torch(imported, gpus))
    if imported.failure is None:
        found.append(checks.bitsandbytes(imported))
    return (*found, *checks.folders(runs))


def next_command(findings: Sequence[Finding]) -> str:
    """What to type now: what mends the first fault, else what to try on this machine."""
    faults = [one.to_type for one in findings if one.state == FAULT and one.to_type is not None]
    if faults:
        return faults[0]
    limits = [one.to_type for one in findings if one.name in ("driver", "packages") and one.to_type]
    return limits[0] if limits else "vramwise demo"


def _show(findings: Sequence[Finding]) -> None:
    from rich.text import Text

    from planner.text.figures import columns, show

    styles = {"ok": "green", "limit": "yellow", "fault": "red"}
    rows: list[list[str | Text]] = [
        [
            one.name,
            Text(one.state, style=styles[one.state]),
            one.found + (f" - {one.to_type}" if one.to_type else ""),
        ]
        for one in findings
    ]
    heads = [("what", "name"), ("state", "name"), ("found", "text")]
    show(lambda out: columns(out, heads, rows, indent=0))
    print(f"\nnext: {next_command(findings)}")
