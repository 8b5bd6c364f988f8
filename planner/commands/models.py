"""List the models of the catalog."""

from __future__ import annotations

import argparse
import json
import sys

from planner.base.errors import ExitCode, InputError, UnknownNameError
from planner.models.catalog import list_models, name_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `models`."""
    parser.add_argument("text", nargs="?", help="list models with this in their name only")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List and print."""
    models = list_models()
    wanted = name_key(args.text) if args.text is not None else ""
    if args.text is not None and not wanted:
        raise InputError("an empty text selects nothing")
    found = [m for m in models if any(wanted in name_key(name) for name in (m.id, m.hub_id, *m.aliases))]
    if not found:
        raise UnknownNameError("model", args.text, (m.id for m in models), "(list all: vramwise models)")
    if args.json:
        from planner.base.json_codec import encode

        json.dump({"version": 1, "models": [encode(m) for m in found]}, sys.stdout, indent=2)
        print()
        return ExitCode.OK
    from planner.text.figures import show
    from planner.text.tables import print_models

    show(lambda out: print_models(out, found))
    return ExitCode.OK
