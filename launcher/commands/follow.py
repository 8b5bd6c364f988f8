"""Follow a run in a terminal: progress, Ctrl-C as a request to stop, predicted beside measured at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
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
from launcher.runs import supervisor
from launcher.runs.events import (
    POLL_SECONDS,
    CheckpointEvent,
    EvalEvent,
    Event,
    EventReader,
    LogEvent,
    StageEvent,
    StartEvent,
    WarningEvent,
)
from launcher.runs.folder import RunFolder
from launcher.runs.record import store_record
from launcher.runs.report.advice import Advice, Adviser
from launcher.runs.report.facts import RunReport, plan_or_none, run_report
from launcher.runs.report.page import visible
from launcher.runs.report.stages import FIRST_STEPS, STARTING, seconds, stage_text
from launcher.runs.report.writing import write_report
from launcher.runs.supervisor import RunStatus
from planner.base.errors import ExitCode
from planner.commands.program import say
from planner.text.figures import rate, show

# Without a terminal a line is printed for at most this many steps of the run.
PLAIN_LINES = 20


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
        self._console.print(Text(message), soft_wrap=True)

    def show(self, event: Event) -> None:
        match event:
            case StartEvent(total_steps=total):
                self._total = total
                self._progress.update(self._task, total=total, description="training")
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
            self.tell(f"advice: {visible(one.message)}")

    def _stage(self, event: StageEvent) -> None:
        """In a terminal the seconds of the stage run; elsewhere a stage without steps is a line."""
        self._elapsed.since = event.time
        self._progress.update(self._task, description=visible(stage_text(event)))
        if not self._console.is_terminal and event.stage in FIRST_STEPS:
            after = seconds(event.time - self._begun)
            self.tell(f"after {after}: {visible(stage_text(event))}")

    def _log(self, event: LogEvent) -> None:
        speed = "" if event.tokens_per_second is None else f", {rate(event.tokens_per_second)} tokens/s"
        text = f"step {event.step}/{self._total}, loss {_number(event.loss)}{speed}"
        self._progress.update(self._task, completed=event.step, description=text)
        if self._console.is_terminal:
            return
        interval = max(1, self._total // PLAIN_LINES)
        due = event.step - self._last_shown >= interval
        if due or self._last_shown == 0 or event.step == self._total:
            self._last_shown = event.step
            self.tell(text)


def follow_run(folder: RunFolder, *, still_running: Callable[[], bool]) -> bool:
    """Show a run's events until its trainer is gone; returns whether the person interrupted it.

    The first Ctrl-C asks the run to stop after the step and save, the second ends it at once.
    """
    reader, samples = EventReader(folder.events), EventReader(folder.samples)
    adviser = Adviser(plan_or_none(folder))
    interrupts = 0
    with _Line() as line:
        while True:
            try:
                over = not still_running()
                for event in reader.read_new():
                    line.show(event)
                    line.advise(adviser.take(event))
                for sample in samples.read_new():
                    line.advise(adviser.take(sample))
                if over:
                    return interrupts > 0
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 1:
                    supervisor.request_stop(folder.path)
                    line.tell("stopping after this step and saving; Ctrl-C again ends the run at once")
                elif interrupts == 2:
                    line.tell("ending the run now")
                    supervisor.kill(folder.path)


def finish(
    folder: RunFolder,
    status: RunStatus,
    *,
    interrupted: bool,
    out: TextIO,
    store: bool = True,
) -> int:
    """Print the run's report and write it, store the record; returns the exit code."""
    report = reported(folder)
    page = str(folder.report_page) if folder.report_page.is_file() else None
    show(lambda console: print_report(console, report, page), out)
    if store and report.first_loss is not None and status.state in ("finished", "stopped", "oom"):
        store_record(folder, "oom" if status.state == "oom" else "ok")
    if status.state == "finished":
        return ExitCode.OK
    if status.state == "stopped":
        return ExitCode.INTERRUPTED if interrupted else ExitCode.OK
    say(f"the run ended: {status.state}: {status.message or 'see ' + str(folder.log('trainer'))}")
    say(f"its output: {folder.log('trainer')}")
    return ExitCode.INTERRUPTED if interrupted else ExitCode.FAILED


def reported(folder: RunFolder) -> RunReport:
    """The run's report, written where that is possible.

    Raises:
        InputError: the folder holds no job.
    """
    try:
        return write_report(folder)
    except OSError as error:
        say(f"{folder.path}: the report could not be written ({error.strerror})")
        return run_report(folder)[0]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
