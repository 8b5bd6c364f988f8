"""Measured runs for others: write your own in a form without paths, names or data, or check such a file.

`records export` writes the records of runs on this machine (`vramwise train`, `vramwise calibrate`): setup,
card, releases and figures. `records check FILE` says whether records can be so, and how they lie beside what
is expected (exit code 1 where one cannot).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.base.errors import ExitCode, InputError, shorten
from planner.commands.program import StoreOnce, say

if TYPE_CHECKING:
    from planner.calibration.records import RunRecord

ACTIONS = ("export", "check")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.usage = "%(prog)s export [-o FILE] | check FILE [--json]"
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help="export or check")
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="check: records, one a line, or one"
    )
    parser.add_argument(
        *("-o", "--output"),
        action=StoreOnce,
        type=Path,
        metavar="FILE.jsonl",
        help="export: where to (default: standard output)",
    )
    parser.add_argument("--json", action="store_true", help="check: print JSON")


def run(args: argparse.Namespace) -> int:
    """Export or check.

    Raises:
        InputError: a file is missing, cannot be read or written, or holds no records.
    """
    if args.action == "export":
        if args.file is not None:
            raise InputError("records export takes no FILE; -o names where to write")
        return _export(args.output)
    if args.file is None or args.output is not None:
        raise InputError("records check takes a FILE, and no -o")
    return _check(args.file, as_json=args.json)


def _export(output: Path | None) -> int:
    from planner.base.data_files import user_data_dir, write_atomically
    from planner.calibration.exchange import exported
    from planner.calibration.records import read_records

    folder = user_data_dir() / "runs"
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found = exported(record for path in paths for record in read_records(path))
    for name, reason in found.left_out:
        say(f"left out: {shorten(name)}: {reason}")
    if not found.records:
        raise InputError(
            "there is no record to export: a run on a GPU (vramwise train, vramwise calibrate) leaves one"
        )
    lines = "".join(
        json.dumps(record.to_dict(), separators=(",", ":"), allow_nan=False) + "\n"
        for record in found.records
    )
    if output is None:
        sys.stdout.write(lines)
        return ExitCode.OK
    try:
        write_atomically(output.expanduser(), lines)
    except OSError as error:
        raise InputError(f"{output}: the records cannot be written ({error.strerror})") from error
    say(f"written: {output} ({len(found.records)} records)")
    return ExitCode.OK


def _check(path: Path, *, as_json: bool) -> int:
    from planner.calibration.plausible import check_record

    checked = [check_record(record) for record in _read(path)]
    if not checked:
        raise InputError(f"{path}: there is no record in it")
    if as_json:
        from planner.base.json_codec import encode

        json.dump({"version": 1, "records": [encode(one) for one in checked]}, sys.stdout, indent=2)
        print()
    else:
        from planner.text.figures import show
        from planner.text.records import print_checked

        show(lambda out: print_checked(out, checked))
    return ExitCode.FAILED if any(one.faults for one in checked) else ExitCode.OK


def _read(path: Path) -> list[RunRecord]:
    """Records of a file: one a line, or one whole, as a run folder's record.json."""
    from planner.base.data_files import read_json
    from planner.calibration.plausible import read_for_check
    from planner.calibration.records import read_records

    return [read_json(path, read_for_check)] if path.suffix == ".json" else list(read_records(path))
