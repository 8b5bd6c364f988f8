"""Follow a run in a terminal: progress, Ctrl-C as a request to stop, predicted beside measured at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from launcher.runs import supervisor
from launcher.runs.attempts import as_trained
from launcher.runs.events import (
    POLL_SECONDS,
    CheckpointEvent,
    EvalEvent,
    Event,
    EventReader,
    LogEvent,
    StartEvent,
    WarningEvent,
    read_events,
)
from launcher.runs.folder import RunFolder
from launcher.runs.record import measured_memory, steady_tokens_per_second, store_record
from launcher.runs.supervisor import RunStatus
from planner.answers.plan import Plan
from planner.base.errors import ExitCode
from planner.commands.program import say
from planner.memory.breakdown import MemoryBreakdown
from planner.text.figures import columns, figure, footnote, heading, pairs, rate, show

# Without a terminal a line is printed for at most this many steps of the run.
PLAIN_LINES = 20


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
        self._console.print(Text(message), soft_wrap=True)

    def show(self, event: Event) -> None:
        match event:
            case StartEvent(total_steps=total):
                self._total = total
                self._progress.update(self._task, total=total, description="training")
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
        due = event.step - self._last_shown >= interval
        if due or self._last_shown == 0 or event.step == self._total:
            self._last_shown = event.step
            self.tell(text)


def follow_run(folder: RunFolder, *, still_running: Callable[[], bool]) -> bool:
    """Show a run's events until its trainer is gone; returns whether the person interrupted it.

    The first Ctrl-C asks the run to stop after the step and save, the second ends it at once.
    """
    reader = EventReader(folder.events)
    interrupts = 0
    with _Line() as line:
        while True:
            try:
                over = not still_running()
                for event in reader.read_new():
                    line.show(event)
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
    plan: Plan | None,
    *,
    interrupted: bool,
    out: TextIO,
    store: bool = True,
) -> int:
    """Say how the run ended, print predicted beside measured, store the record; returns the exit code."""
    events = as_trained(read_events(folder.events))
    losses = [event.loss for event in events if isinstance(event, LogEvent) and event.loss is not None]
    show(lambda console: _print_end(console, folder, status, plan, events, losses), out)
    trained = any(isinstance(event, LogEvent) for event in events)
    if store and trained and status.state in ("finished", "stopped", "oom"):
        store_record(folder, "oom" if status.state == "oom" else "ok")
    if status.state == "finished":
        return ExitCode.OK
    if status.state == "stopped":
        return ExitCode.INTERRUPTED if interrupted else ExitCode.OK
    say(f"the run ended: {status.state}: {status.message or 'see ' + str(folder.log('trainer'))}")
    say(f"its output: {folder.log('trainer')}")
    return ExitCode.INTERRUPTED if interrupted else ExitCode.FAILED


def _print_end(
    console: Console,
    folder: RunFolder,
    status: RunStatus,
    plan: Plan | None,
    events: list[Event],
    losses: list[float],
) -> None:
    heading(console, f"{status.state.capitalize()} after {status.step} steps")
    rows = []
    if losses:
        rows.append(("loss", f"{_number(losses[0])} at first, {_number(losses[-1])} at last"))
    if folder.adapter.is_dir():
        rows.append(("adapter", str(folder.adapter)))
    pairs(console, rows)
    if plan is not None:
        heading(console, "Predicted beside measured")
        _print_memory(console, plan.memory, events)
        _print_speed(console, plan, events)


def _print_memory(console: Console, predicted: MemoryBreakdown, events: list[Event]) -> None:
    measured = measured_memory(events)
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


def _print_speed(console: Console, plan: Plan, events: list[Event]) -> None:
    seen = steady_tokens_per_second(events)
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
