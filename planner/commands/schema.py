"""Print the JSON Schema of what a command prints as JSON: plan, estimate, compare, check, or a run's record.

Within a version keys are added, and none is changed or taken away.
"""

from __future__ import annotations

import argparse
import json
import sys

from planner.base.errors import ExitCode

NAMES = ("plan", "estimate", "compare", "check", "record")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.usage = "%(prog)s NAME"
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from planner.schemas import schema

    sys.stdout.write(json.dumps(schema(args.name), indent=2, ensure_ascii=False) + "\n")
    return ExitCode.OK
