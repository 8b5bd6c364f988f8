"""report.json, report.md and loss.svg of a run, written once it is over."""

from __future__ import annotations

import json
import sys

from launcher.runs.folder import RunFolder
from launcher.runs.report.facts import RunReport, run_report
from launcher.runs.report.page import markdown, visible
from launcher.runs.report.picture import loss_curve
from planner.base.data_files import write_atomically
from planner.base.errors import InputError


def write_report(folder: RunFolder, *, over: bool = False) -> RunReport:
    """Gather and write; whoever sees a run end calls it, and the last one's stays. `over`: see run_report.

    Raises:
        InputError: the folder holds no job.
        OSError: it cannot be written.
    """
    report, history = run_report(folder, over=over)
    evaluations = [(one.step, one.loss) for one in report.evaluations if one.loss is not None]
    title = visible(f"Loss of {report.run}")
    write_atomically(folder.loss_curve, loss_curve(history.losses.points(), evaluations, title=title))
    write_atomically(folder.report_page, markdown(report, folder.loss_curve.name))
    write_atomically(folder.report, json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    return report


def write_or_say(folder: RunFolder, *, over: bool = False) -> None:
    """The same for the processes of a run, whom nobody need follow: what prevents it is in the log."""
    try:
        write_report(folder, over=over)
    except (InputError, OSError) as error:
        print(f"the report could not be written: {error}", file=sys.stderr)
