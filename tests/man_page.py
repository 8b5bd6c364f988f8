"""docs/man/vramwise.1: every command and option, from the parsers that read them, by argparse-manpage."""

from __future__ import annotations

import os
from unittest import mock

from argparse_manpage.manpage import Manpage

from launcher.cli import COMMANDS, DESCRIPTION, PROGRAM, SUBCOMMANDS
from planner.commands.program import Parser, declare

CHANGED = "2026-12-01"
"""When what the page says beside the parsers was last changed."""
ENDS = r"""
.SH EXIT STATUS
.TP
.B 0
done, and what was asked for fits
.TP
.B 1
something failed while it ran
.TP
.B 2
bad input: one line on standard error says what, and what is accepted
.TP
.B 3
it does not fit; of \fBvramwise check\fR: a figure is beyond the card
.TP
.B 130
interrupted
.PP
A training run has codes of its own: docs/reliability.md.
.SH ENVIRONMENT
.TP
.B VRAMWISE_DATA_DIR
where records, calibrations and runs are kept
.TP
.B PYTORCH_CUDA_ALLOC_CONF
torch's allocator, which plans are made for too
.TP
.B HF_HUB_OFFLINE, NO_COLOR
as elsewhere
"""


def man_page() -> str:
    """The page's text."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION)
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands = {**COMMANDS, **{" ".join(words): command for words, command in SUBCOMMANDS.items()}}
    with mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}):
        for name, command in commands.items():
            declare(listed.add_parser(name, help=command.help), command)
        page = Manpage(parser, format="single-commands-section")
        page.date, page.manual = CHANGED, f"{PROGRAM}'s commands"
        text = str(page)
    named = f".SH NAME\n{PROGRAM}\n"
    assert named in text
    text = text.replace(named, f".SH NAME\n{PROGRAM} \\- plan fine-tuning runs on a GPU, and launch them\n")
    return "\n".join(line.rstrip() for line in text.splitlines()) + ENDS
