"""Follow a run in a terminal: progress, Ctrl-C as a request to stop, predicted beside measured at the end."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

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
    MemoryEvent,
    StartEvent,
    WarningEvent,
)
from launcher.runs.folder import RunFolder
from launcher.runs.minding import stopping
from launcher.runs.record import read_plan, store_record
from launcher.runs.state import TRIED_AGAIN, RunStatus, last_checkpoint
from launcher.runs.summary import RunSummary, summarize
from launcher.tui.text import plain
from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.commands.program import say
from planner.memory.breakdown import MemoryBreakdown
from planner.text.figures import columns, figure, footnote, heading, pairs, rate, show

LONGEST_MESSAGE = 2000
# Without a terminal a line is printed for at most this many steps of the run.
PLAIN_LINES = 20
SHOWN_BYTES = 2**18
"""Of a run that is followed late, what its events said last: about a thousand steps."""


class _Line:
    """Shows events: a live line in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task("loading", total=None)
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
        reader.skip_to_last(SHOWN_BYTES)
        try:
            with _Line() as line:
                if self.ends_run:
                    line.tell(f"run folder: {self.folder.path}")
                line.begin(self.folder)
                while True:
                    over = not self.goes_on()
                    for event in reader.read_new():
                        line.show(event)
                    if reader.behind:
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
        line.tell(f"{what}; kept: {kept(last_checkpoint(self.folder.events))}")


def kept(checkpoint: CheckpointEvent | None) -> str:
    """What remains of a run that was ended at once."""
    if checkpoint is None:
        return "nothing, since no checkpoint was written"
    return f"the checkpoint of step {checkpoint.step:,}, {plain(checkpoint.path)}"


def read_plan_or_say(folder: RunFolder) -> Plan | None:
    """The run's plan; where it cannot be read, that is said and the run is told without it."""
    try:
        return read_plan(folder)
    except InputError as error:
        say(f"damaged: {error}")
        return None


def finish(
    folder: RunFolder, status: RunStatus, plan: Plan | None, *, out: TextIO, store: bool = True
) -> int:
    """Say how the run ended, print predicted beside measured, store the record; returns the exit code, which
    is that of the run's state (ends.RUN_ENDS).
    """
    summary = summarize(folder.events)
    show(lambda console: _print_end(console, folder, status, plan, summary), out)
    if store and summary.trained and status.state in ("finished", "stopped", "oom"):
        store_record(folder, "oom" if status.state == "oom" else "ok", summary)
    if status.state != "finished":
        say(f"the run ended: {status.state}: {status.message or 'see ' + str(folder.log('trainer'))}")
    if status.state not in ("finished", "stopped"):
        say(f"its output: {folder.log('trainer')}")
    return int(supervisor.end_code(status))


def _print_end(
    console: Console, folder: RunFolder, status: RunStatus, plan: Plan | None, summary: RunSummary
) -> None:
    heading(console, f"{plain(status.state).capitalize()} after {status.step} steps")
    rows = []
    if summary.last_loss is not None:
        rows.append(("loss", f"{_number(summary.first_loss)} at first, {_number(summary.last_loss)} at last"))
    if folder.adapter.is_dir():
        rows.append(("adapter", plain(folder.adapter)))
    else:
        rows.append(("kept", kept(summary.checkpoint)))
    pairs(console, rows)
    if plan is not None:
        heading(console, "Predicted beside measured")
        _print_memory(console, plan.memory, summary.memory)
        _print_speed(console, plan, summary.tokens_per_second)


def _print_memory(console: Console, predicted: MemoryBreakdown, measured: Mapping[str, MemoryEvent]) -> None:
    on_gpu = any(event.allocated_bytes is not None for event in measured.values())
    rows = []
    for phase in predicted.phases:
        event = measured.get(phase.name)
        figures = [
            ("allocated", phase.allocated_bytes, None if event is None else event.allocated_bytes),
            ("reserved", phase.reserved_bytes, None if event is None else event.reserved_bytes),
            (
                "driver" if on_gpu else "process",
                phase.process_bytes,
                None if event is None else event.process_bytes,
            ),
        ]
        for what, expected, seen in figures:
            if on_gpu or what == "process":
                rows.append([phase.name, what, figure(expected), *_seen(expected, seen, on_gpu)])
    heads = [("phase", "name"), ("", "name"), ("predicted GiB", "number"), ("measured", "number")]
    columns(console, [*heads, ("error", "number")], rows)
    if measured and not on_gpu:
        console.print()
        footnote(
            console,
            "The prediction is for the GPU; measured is the resident memory of a process on the CPU, "
            "so the two cannot agree.",
        )


def _seen(expected: int, seen: int | None, comparable: bool) -> list[str]:
    if seen is None:
        return ["not measured", ""]
    return [figure(seen), f"{expected / seen - 1:+.1%}" if comparable and seen else ""]


def _print_speed(console: Console, plan: Plan, seen: float | None) -> None:
    if seen is None or plan.speed is None:
        return
    console.print()
    expected = plan.speed.tokens_per_second
    if plan.duration is not None and plan.duration.useful_tokens_per_second is not None:
        # TRL leaves padding out of its count too, but for the little that packed rows have.
        expected = plan.duration.useful_tokens_per_second
    forecast = f"{rate(expected)} forecast for {plan.gpu.spec.id}"
    pairs(console, [("tokens/s", f"{forecast}, {rate(seen)} measured")])


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
