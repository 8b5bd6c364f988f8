"""Check claims: figures that somebody states for a model on a card, in a sentence or in a table file.

Each figure is `possible` (within what is expected of the setup, as claimed, that favours it most), `tight`
(beyond that, within what cannot be passed) or `beyond the card`, with the reason and the true figure. GB is
read as GiB. Exit code 3 when a figure is beyond the card.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from planner.base.errors import ExitCode, shorten
from planner.commands.knobs import add_knobs, given_knobs
from planner.commands.program import StoreOnce, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `check`."""
    parser.add_argument(
        "claim",
        metavar="CLAIM",
        help='"Qwen2.5-14B 4k QLoRA: 11.8 GB, 2,600 tok/s on a 5060 Ti", or a table: FILE.csv, FILE.md',
    )
    parser.add_argument(
        "--model", action=StoreOnce, help="the model, where the claim names none that is known"
    )
    parser.add_argument("--gpu", action=StoreOnce, help="the card, where the claim names none or another")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="the config of a model that is not on this machine may be fetched from the Hugging Face Hub",
    )
    add_knobs(parser)


def run(args: argparse.Namespace) -> int:
    """Read, judge and print."""
    from planner.claims.judge import judge
    from planner.claims.sentence import read_claim
    from planner.claims.table import is_table, read_table

    given = dict(given_knobs(args))
    if is_table(args.claim):
        claims = list(read_table(Path(args.claim), knobs=given, model=args.model, gpu=args.gpu))
    else:
        claims = [read_claim(args.claim, knobs=given, model=args.model, gpu=args.gpu)]
    inspector = getattr(args, "inspector", None)
    judged = [judge(one, allow_network=args.allow_download, inspector=inspector) for one in claims]
    for one in claims:
        if one.unread:
            say(f"not understood in {shorten(one.text)}: {', '.join(one.unread)}")
    if args.json:
        values = {"version": 1, "claims": [one.to_dict() for one in judged]}
        json.dump(values, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        from planner.text.claims import print_claims
        from planner.text.figures import show

        show(lambda out: print_claims(out, judged))
    return ExitCode.DOES_NOT_FIT if any(one.is_beyond for one in judged) else ExitCode.OK
