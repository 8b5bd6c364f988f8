"""Follow a run in a terminal: progress, Ctrl-C as a request to stop, predicted beside measured at the end."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from launcher.commands.ending import print_report
from launcher.commands.interrupts import Interrupts
from launcher.commands.runs_folder import command_for
from launcher.runs import supervisor
from launcher.runs.events import (
    POLL_SECONDS,
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    EventReader,
    LogEvent,
    StageEvent,
    StartEvent,
    WarningEvent,
)
from launcher.runs.folder import RunFolder, anchored
from launcher.runs.kept.checkpoints import path_of
from launcher.runs.minding import stopping
from launcher.runs.record import store_record
from launcher.runs.report.advice import Advice, Adviser
from launcher.runs.report.facts import RunReport, plan_or_none, run_report
from launcher.runs.report.stages import FIRST_STEPS, STARTING, seconds, stage_text
from launcher.runs.report.writing import write_report
from launcher.runs.state import TRIED_AGAIN, RunStatus, last_checkpoint
from launcher.runs.summary import summarize
from launcher.tui.text import plain
from planner.base.errors import InputError
from planner.commands.program import say
from planner.text.figures import rate, show

LONGEST_MESSAGE = 2000
# Without a terminal a line is printed for at most this many steps of the run.
PLAIN_LINES = 20
SHOWN_BYTES = 2**18
"""Of a run that is followed late, what its events said last: about a thousand steps."""


class _Elapsed(ProgressColumn):
    """How long the present stage has lasted."""

    def __init__(self) -> None:
        self.since = time.time()
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(seconds(time.time() - self.since), style="progress.elapsed")


class _Line:
    """Shows events: a live line in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
        self._elapsed = _Elapsed()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            self._elapsed,
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task(STARTING, total=None)
        self._begun = time.time()
        self._total = 0
        self._last_shown = 0

    def __enter__(self) -> _Line:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, message: str) -> None:
        self._console.print(Text(plain(message, LONGEST_MESSAGE)), soft_wrap=True)

    def begin(self, folder: RunFolder) -> None:
        """Take over where the run stands: its start may be far back in the events."""
        now = supervisor.status(folder.path)
        if now.total_steps is not None:
            self._start(now.total_steps)

    def _start(self, total: int) -> None:
        self._total = total
        self._progress.update(self._task, total=total, description="training")

    def show(self, event: Event) -> None:
        match event:
            case StartEvent(total_steps=total):
                self._start(total)
            case AttemptEvent(number=number, reason=reason, from_step=step, changes=changes) if number > 1:
                then = f"; {changes}" if changes else ""
                self.tell(f"attempt {number} ({reason}), from step {step}{then}")
            case EndEvent(state=state, message=message) if state in TRIED_AGAIN:
                self.tell(f"{state}: {message}")
            case StageEvent():
                self._stage(event)
            case LogEvent():
                self._log(event)
            case EvalEvent(step=step, loss=loss):
                self.tell(f"step {step}: evaluation loss {_number(loss)}")
            case CheckpointEvent(path=path):
                self.tell(f"checkpoint {path}")
            case WarningEvent(message=message):
                self.tell(f"note: {message}")
            case _:
                pass

    def advise(self, found: Iterable[Advice]) -> None:
        """Tell advice."""
        for one in found:
            self.tell(f"advice: {plain(one.message)}")

    def _stage(self, event: StageEvent) -> None:
        """In a terminal the seconds of the stage run; elsewhere a stage without steps is a line."""
        self._elapsed.since = event.time
        self._progress.update(self._task, description=plain(stage_text(event)))
        if not self._console.is_terminal and event.stage in FIRST_STEPS:
            after = seconds(event.time - self._begun)
            self.tell(f"after {after}: {plain(stage_text(event))}")

    def _log(self, event: LogEvent) -> None:
        speed = "" if event.tokens_per_second is None else f", {rate(event.tokens_per_second)} tokens/s"
        text = f"step {event.step}/{self._total}, loss {_number(event.loss)}{speed}"
        self._progress.update(self._task, completed=event.step, description=text)
        if self._console.is_terminal:
            return
        interval = max(1, self._total // PLAIN_LINES)
        due = abs(event.step - self._last_shown) >= interval
        if due or self._last_shown == 0 or event.step == self._total:
            self._last_shown = event.step
            self.tell(text)


@dataclass(slots=True)
class RunView:
    """Shows a run until it is over or the view is left. `ends_run` says whether Ctrl-C and signals end the
    run, as in the command that started it, or only the view.
    """

    folder: RunFolder
    interrupts: Interrupts
    goes_on: Callable[[], bool]
    ends_run: bool
    _presses: int = field(default=0, init=False)
    _told: int | None = field(default=None, init=False)

    def show(self) -> int | None:
        """Show events as they come; returns the signal by which the view was left, None at the run's end."""
        reader, ending = EventReader(self.folder.events), supervisor.Ending(self.folder)
        samples = EventReader(self.folder.samples)
        whole = not self.folder.events.exists() or self.folder.events.stat().st_size <= SHOWN_BYTES
        adviser = Adviser(plan_or_none(self.folder), from_start=whole)
        for one in (reader, samples):
            one.skip_to_last(SHOWN_BYTES)
        try:
            with _Line() as line:
                if self.ends_run:
                    line.tell(f"run folder: {self.folder.shown}")
                line.begin(self.folder)
                while True:
                    over = not self.goes_on()
                    for event in reader.read_new():
                        line.show(event)
                        line.advise(adviser.take(event))
                    for sample in samples.read_new():
                        line.advise(adviser.take(sample))
                    if reader.behind or samples.behind:
                        continue
                    if over:
                        return None
                    left = self._answer(line)
                    if left is not None:
                        return left
                    ending.tick()
                    time.sleep(POLL_SECONDS)
        except OSError as error:
            # The terminal is gone (SIGHUP is on its way, or has been), or the pipe is closed.
            if error.errno == errno.EIO:
                return signal.SIGHUP
            if error.errno == errno.EPIPE:
                return signal.SIGPIPE
            raise

    def _answer(self, line: _Line) -> int | None:
        """Do what signals ask for; the signal by which the view is left, if it is."""
        seen = self.interrupts
        if seen.gone:
            return signal.SIGHUP
        if not self.ends_run:
            if seen.presses or seen.asked:
                line.tell(f"the run goes on; {command_for('stop', self.folder)} ends it after its step")
                return seen.asked or signal.SIGINT
            return None
        if seen.asked is not None and self._told is None:
            self._told = seen.asked
            stopping.ask(self.folder, stopping.AFTER_STEP)
            line.tell(f"{signal.Signals(seen.asked).name}: stopping after this step and saving")
        while self._presses < min(seen.presses, 3):
            self._presses += 1
            self._press(line)
        return None

    def _press(self, line: _Line) -> None:
        if self._presses == 1:
            stopping.ask(self.folder, stopping.AFTER_STEP)
            line.tell("stopping after this step and saving; Ctrl-C again ends the run at once")
            return
        how = stopping.NOW if self._presses == 2 else stopping.KILL
        stopping.ask(self.folder, how)
        what = "ending the run now" if self._presses == 2 else "killing the trainer"
        line.tell(f"{what}; kept: {kept(self.folder)}")


def kept(folder: RunFolder) -> str:
    """What remains of a run that was ended at once, and where it is now."""
    checkpoint = last_checkpoint(folder.events)
    if checkpoint is None:
        return "nothing, since no checkpoint was written"
    where = path_of(folder.shown / folder.checkpoints.name, checkpoint.step)
    return f"the checkpoint of step {checkpoint.step:,}, {plain(where)}"


def follow_to_the_end(
    folder: RunFolder, interrupts: Interrupts, goes_on: Callable[[RunFolder], bool], *, ends_run: bool
) -> tuple[RunFolder, int | None]:
    """Show a run, wherever its folder is moved to meanwhile; returns where it is then, and what
    RunView.show does. `goes_on` is asked by the folder as it can be opened now.
    """
    with anchored(folder) as held:
        left = RunView(held, interrupts, lambda: goes_on(held), ends_run=ends_run).show()
        return RunFolder(held.shown), left


def finish(folder: RunFolder, status: RunStatus, *, out: TextIO, store: bool = True) -> int:
    """Print the run's report and write it, store the record; returns the exit code, which is that of the
    run's state (ends.RUN_ENDS).
    """
    report = reported(folder)
    if report is not None:
        page = str(folder.report_page) if folder.report_page.is_file() else None
        show(lambda console: print_report(console, report, page), out)
    if store and status.state in ("finished", "stopped", "oom"):
        summary = summarize(folder.events)
        if summary.trained:
            store_record(folder, "oom" if status.state == "oom" else "ok", summary)
    if status.state != "finished":
        say(f"the run ended: {status.state}: {status.message or 'see ' + str(folder.log('trainer'))}")
    if status.state not in ("finished", "stopped"):
        say(f"its output: {folder.log('trainer')}")
    return int(supervisor.end_code(status))


def reported(folder: RunFolder) -> RunReport | None:
    """The run's report, written where that is possible; None, which is said, where the job is damaged."""
    try:
        return write_report(folder)
    except InputError as error:
        say(f"damaged: {error}")
        return None
    except OSError as error:
        say(f"{folder.path}: the report could not be written ({error.strerror})")
        return run_report(folder)[0]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
