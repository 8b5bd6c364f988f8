"""`python -m launcher.runs.keeper RUN_DIR [DESCRIPTOR...]` starts a run's trainer and sampler.

It minds them to the run's end. It needs nobody to watch it and holds nothing that can break it: no torch, no
driver. It writes the end that a dead trainer could not, starts the sampler again, ends a trainer that hangs
and makes the next attempt. Should it be killed, the trainer goes on and the sampler ends with it. The open
files of the GPUs' locks (gpu_lock.py) are handed on to the trainer. The exit codes are
ends.RunExit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.runs.allocator import allocator_environment
from launcher.runs.attempts import Attempt, add_attempt, read_attempts
from launcher.runs.ends import RUN_ENDS, RunExit, exit_code
from launcher.runs.events import EndEvent, WarningEvent, append_event, from_line
from launcher.runs.folder import RunBusyError, RunFolder, anchored, hold_lock
from launcher.runs.heartbeat import STACKS_SIGNAL, read_beat
from launcher.runs.kept import checkpoints
from launcher.runs.minding import ranks, stopping
from launcher.runs.minding.compiled_cache import cache_environment
from launcher.runs.minding.deaths import KillCounters, advice_on_memory, read_kill_counters, signal_name
from launcher.runs.minding.hang import HangLimits, HangWatch, Silence
from launcher.runs.minding.smaller import ask_for_smaller
from launcher.runs.minding.spawn import spawn
from launcher.runs.report.writing import write_or_say
from launcher.runs.state import last_checkpoint, read_recent
from launcher.runs.tail import last_lines, lines_from_the_end
from launcher.runs.training_job import OWN_ENGINE, TrainingJob
from planner.base.errors import InputError, shorten

POLL_SECONDS = 0.2
DUMP_SECONDS = 2.0
"""Left at most to a trainer that hangs for writing down its stacks."""
SAMPLER_RESTARTS = 3
HANG_RESTARTS = 3
"""Restarts after a hang without a new checkpoint in between, after which the run is given up."""
_LAST_LINES = 200
_TRAINERS = {False: "launcher.training.train", True: "launcher.training.several.agent"}
_OTHER_ENGINE = "launcher.training.engines.engine"
_STATES = {end.code: end.state for end in reversed(RUN_ENDS)}

Spawn = Callable[[], "subprocess.Popen[bytes]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnd:
    """How an attempt ended: state, message, step and the room of its end event; `host_memory` when the
    kernel ended the trainer for want of memory of the host, `gone` when the trainer does not exist any more.
    """

    state: str
    message: str
    step: int
    room_bytes: int | None = None
    host_memory: bool = False
    gone: bool = True


def next_attempt(folder: RunFolder, end: AttemptEnd) -> Attempt | None:
    """The attempt that is made after this end; None: the run is over."""
    if not end.gone or end.host_memory or end.state not in ("oom", "hang"):
        return None
    if _job(folder).engine != OWN_ENGINE:
        return None
    found = checkpoints.newest(folder.checkpoints).newest
    from_step = 0 if found is None else found.step
    if end.state == "oom":
        return ask_for_smaller(folder, from_step=from_step, room_bytes=end.room_bytes)
    return _after_hang(folder, from_step)


def _after_hang(folder: RunFolder, from_step: int) -> Attempt | None:
    """The same again, a few times."""
    attempts = read_attempts(folder.attempts)
    if not attempts:
        return None
    restarts = 0
    for attempt in reversed(attempts):
        if attempt.reason != "hang" or attempt.from_step != from_step:
            break
        restarts += 1
    if restarts >= HANG_RESTARTS:
        return None
    return dataclasses.replace(
        attempts[-1], number=attempts[-1].number + 1, reason="hang", from_step=from_step, changes=""
    )


@dataclass(slots=True)
class Keeper:
    """Minds one run to its end. `start_trainer` and `start_sampler` start the processes; `ranks_here` says
    how many ranks the attempt that begins has on this machine, 0 where the trainer is one process and not
    torchrun's agent, `ranks_in_all` how many on all. Both are asked once an attempt: an end can be told, and
    no rank stays behind, whatever has become of the run's files meanwhile.
    """

    folder: RunFolder
    start_trainer: Spawn
    start_sampler: Spawn
    limits: HangLimits = field(default_factory=HangLimits)
    patience_seconds: float = stopping.PATIENCE_SECONDS
    count_kills: Callable[[], KillCounters] = read_kill_counters
    ranks_here: Callable[[], int] = lambda: 0
    ranks_in_all: Callable[[], int] = lambda: 1
    _sampler: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _sampler_restarts: int = field(default=0, init=False)
    _signals: int = field(default=0, init=False)
    _here: int = field(default=0, init=False)
    _in_all: int = field(default=1, init=False)

    def keep(self) -> RunExit:
        """Start the trainer, again where that helps, until the run is over; returns the exit code."""
        self._take_signals()
        try:
            while True:
                end = self._attempt()
                following = None if self._asked() else next_attempt(self.folder, end)
                if following is None:
                    return exit_code(end.state)
                add_attempt(self.folder.attempts, following)
        finally:
            self._end_sampler()

    def _attempt(self) -> AttemptEnd:
        """Start the trainer and see how it ends; its end event is there then."""
        with contextlib.suppress(FileNotFoundError):
            self.folder.heartbeat.unlink()
        offset, kills = _size(self.folder.events), self.count_kills()
        ranks.clear(self.folder)
        self._here, self._in_all = self.ranks_here(), self.ranks_in_all()
        trainer = self.start_trainer()
        ender = stopping.Ender(functools.partial(self._send, trainer), self.patience_seconds)
        watch = HangWatch(self.folder.heartbeat, self.limits)
        silence: Silence | None = None
        while trainer.poll() is None and silence is None:
            self._mind_sampler()
            now = time.monotonic()
            if (how := self._asked()) is not None:
                ender.tick(how, now)
            silence = watch.tick(now)
            time.sleep(POLL_SECONDS)
        if silence is not None:
            self._end_hanging(trainer)
        else:
            self._end_rest()
        if trainer.poll() is not None:
            # What the trainer has forked dies with it: it would hold the run's lock.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(trainer.pid, signal.SIGKILL)
        return self._end(trainer, offset, kills, silence)

    def _asked(self) -> str | None:
        return stopping.asked(self.folder)

    def _take_signals(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        """The first asks for a stop after the step, a second one that ends processes for one at once."""
        again = self._signals > 0
        self._signals += number != signal.SIGUSR1
        with contextlib.suppress(OSError):
            stopping.ask(self.folder, stopping.NOW if again and self._signals > 1 else stopping.AFTER_STEP)

    def _mind_sampler(self) -> None:
        """Start the sampler, and again when it has died, a few times."""
        sampler = self._sampler
        if sampler is not None and sampler.poll() is None:
            return
        if sampler is not None:
            if self._sampler_restarts > SAMPLER_RESTARTS:
                return
            self._sampler_restarts += 1
            code = sampler.returncode
            how = signal_name(-code) if code < 0 else f"exit code {code}"
            given_up = self._sampler_restarts > SAMPLER_RESTARTS
            then = "no more samples are taken" if given_up else "another one is started"
            self._warn(f"the sampler ended ({how}); {then}")
            if given_up:
                return
        self._sampler = self.start_sampler()

    def _end_sampler(self) -> None:
        sampler = self._sampler
        if sampler is None or sampler.poll() is not None:
            return
        sampler.terminate()
        try:
            sampler.wait(self.patience_seconds)
        except subprocess.TimeoutExpired:
            sampler.kill()

    def _send(self, trainer: subprocess.Popen[bytes], number: int) -> None:
        """Send a signal to the trainer; of several ranks to each, since torchrun's agent would end them."""
        pids = ranks.live_ranks(self.folder, self._here)
        if pids:
            ranks.send(pids, number)
        if not pids or number == signal.SIGKILL:
            trainer.send_signal(number)

    def _end_rest(self) -> None:
        """Whatever has ended torchrun's agent: none of its ranks may stay behind."""
        if self._here:
            ranks.send(ranks.live_ranks(self.folder, self._here), signal.SIGKILL)

    def _end_hanging(self, trainer: subprocess.Popen[bytes]) -> None:
        """Have the stacks written down, then SIGTERM, then SIGKILL."""
        if self._here:
            self._write_stacks()
        for number, seconds in (
            (STACKS_SIGNAL, min(DUMP_SECONDS, self.patience_seconds)),
            (signal.SIGTERM, self.patience_seconds),
            (signal.SIGKILL, self.patience_seconds),
        ):
            self._send(trainer, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                trainer.wait(seconds)
                return

    def _write_stacks(self) -> None:
        """The stacks of all ranks into the log; one that was stopped writes its own when it may go on."""
        pids = ranks.live_ranks(self.folder, self._here)
        ranks.send(pids, STACKS_SIGNAL)
        ranks.send(pids, signal.SIGCONT)
        time.sleep(min(DUMP_SECONDS, self.patience_seconds))
        ranks.collect_stacks(self.folder, pids)

    def _end(
        self, trainer: subprocess.Popen[bytes], offset: int, kills: KillCounters, silence: Silence | None
    ) -> AttemptEnd:
        """What the trainer said of its end, else what can be told from outside, written in its place."""
        told = _told_end(self.folder.events, offset)
        if told is not None and (silence is None or told.state == "finished"):
            return AttemptEnd(
                state=told.state, message=told.message, step=told.step, room_bytes=told.room_bytes
            )
        end = self._untold(trainer.returncode, kills) if silence is None else self._hung(trainer, silence)
        append_event(
            self.folder.events,
            EndEvent(time=time.time(), state=end.state, message=end.message[:2000], step=end.step),
        )
        return end

    def _hung(self, trainer: subprocess.Popen[bytes], silence: Silence) -> AttemptEnd:
        step = self._last_step()
        gone = trainer.poll() is not None
        end = AttemptEnd(state="hang", message="", step=step, gone=gone)
        if not gone:
            what = (
                f"process {trainer.pid} cannot be ended even by SIGKILL: it waits within the kernel, mostly "
                "for a driver, and the GPU is free again after a reboot"
            )
        elif self._asked():
            what = "it was ended, as was asked for"
        elif (following := next_attempt(self.folder, end)) is None:
            what = f"it was ended, and after {HANG_RESTARTS} restarts without progress the run is given up"
        else:
            what = f"it was ended and is started again from step {following.from_step:,}"
        return dataclasses.replace(end, message=f"{silence}; {what}; its stacks are in trainer.log")

    def _untold(self, code: int, kills: KillCounters) -> AttemptEnd:
        """The end of a trainer that wrote none, by its exit code."""
        step = self._last_step()
        first = ranks.first_to_fail(self.folder, self._in_all) if self._here else None
        if first is not None and not self._asked():
            return self._of_rank(first, step, kills)
        if code >= 0:
            state = _STATES.get(RunExit(code), "failed") if code in set(RunExit) else "failed"
            said = last_lines(self.folder.log("trainer"), 1)
            message = shorten(said[0], 500).strip("'\"") if said else f"it ended with exit code {code}"
            return AttemptEnd(state=state, message=message, step=step)
        name, kept = signal_name(-code), self._kept()
        if self._asked() in (stopping.NOW, stopping.KILL) or (self._asked() and -code == signal.SIGTERM):
            return AttemptEnd(state="interrupted", message=f"ended on request by {name}; {kept}", step=step)
        whose = self.count_kills().grown_since(kills) if -code == signal.SIGKILL else None
        if whose is not None:
            message = f"{advice_on_memory(whose)}; {kept}"
            return AttemptEnd(state="oom", message=message, step=step, host_memory=True)
        message = f"the trainer was ended by {name} after step {step:,}; {kept}"
        return AttemptEnd(state="killed", message=message, step=step)

    def _of_rank(self, first: ranks.RankEnd, step: int, kills: KillCounters) -> AttemptEnd:
        """The end of a run by one of its ranks."""
        step = max(step, first.step)
        message, whose = first.message, None
        if first.state == "killed":
            whose = self.count_kills().grown_since(kills) if "SIGKILL" in message else None
            message += f" after step {step:,}; the others were ended; {self._kept()}"
        if whose is not None:
            message = f"{advice_on_memory(whose)}; {message}"
        return AttemptEnd(
            state="oom" if whose is not None else first.state,
            message=message,
            step=step,
            room_bytes=first.room_bytes,
            host_memory=whose is not None,
        )

    def _kept(self) -> str:
        checkpoint = last_checkpoint(self.folder.events)
        if checkpoint is None:
            return "no checkpoint was written"
        where = checkpoints.path_of(self.folder.shown / self.folder.checkpoints.name, checkpoint.step)
        return f"the last checkpoint is of step {checkpoint.step:,} ({where})"

    def _last_step(self) -> int:
        """The last step that events or heartbeat know of."""
        beat = read_beat(self.folder.heartbeat)
        return max(read_recent(self.folder.events).step, 0 if beat is None else beat.step)

    def _warn(self, message: str) -> None:
        append_event(self.folder.events, WarningEvent(time=time.time(), message=message))


def _told_end(path: Path, offset: int) -> EndEvent | None:
    """The end event that was written behind `offset`; the file may have been cut or replaced since."""
    down_to = offset if offset <= _size(path) else 0
    for number, line in enumerate(lines_from_the_end(path, down_to=down_to)):
        event = from_line(line)
        if isinstance(event, EndEvent):
            return event
        if number >= _LAST_LINES:
            break
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _job(folder: RunFolder) -> TrainingJob:
    """The job as the present attempt trains it."""
    job, attempts = folder.read_job(), read_attempts(folder.attempts)
    return attempts[-1].apply(job) if attempts else job


def _trainer(folder: RunFolder) -> str:
    """The module that trains the present attempt."""
    return _TRAINERS[_ranks_here(folder) > 0] if _job(folder).engine == OWN_ENGINE else _OTHER_ENGINE


def _ranks_here(folder: RunFolder) -> int:
    job = _job(folder)
    return job.local_processes if job.setup.num_processes > 1 else 0


def main(arguments: list[str]) -> int:
    """Mind the run of the folder named; returns the exit code."""
    if not arguments or not all(one.isdecimal() for one in arguments[1:]):
        print("usage: python -m launcher.runs.keeper RUN_DIR [DESCRIPTOR...]", file=sys.stderr)
        return RunExit.BAD_INPUT
    gpu = [int(one) for one in arguments[1:]]
    variables = allocator_environment(os.environ) | cache_environment(os.environ)
    try:
        # The folder may be renamed while the run goes on.
        with anchored(RunFolder(Path(arguments[0]).resolve())) as folder, hold_lock(folder, "keeper"):
            code = Keeper(
                folder,
                start_trainer=lambda: spawn(folder, "trainer", _trainer(folder), variables, descriptors=gpu),
                start_sampler=lambda: spawn(folder, "sampler", "launcher.runs.sampler"),
                ranks_here=lambda: _ranks_here(folder),
                ranks_in_all=lambda: _job(folder).setup.num_processes,
            ).keep()
            # Before the lock is given back: who waits for the run's end finds the report.
            write_or_say(RunFolder(folder.shown), over=True)
            return code
    except (RunBusyError, InputError) as error:
        print(error, file=sys.stderr)
        return RunExit.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
