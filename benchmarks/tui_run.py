"""The screen of a run with a million events, with a thousand a second, and for an hour.

    python -m benchmarks.tui_run [--events 1000000] [--minutes 60]

Drives the screen without a terminal (Textual's Pilot), each in a process of its own:

- `open`: from the key that opens a finished run to the paint of its end, with the file in the kernel's cache.
- `flow`: 10,000 events in 10 s of a run that is alive, while a key is pressed every 100 ms by another thread:
  from the press to the paint of what it does, and whether every event was counted.
- `hour`: an hour of a run that logs a step and a sample a second, polled as often as in an hour, as fast as
  it goes, with what the application does each minute: the peak of resident memory.

Writes benchmarks/results/tui_run.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import launcher.tui  # noqa: F401 - before Textual, whose frame rate it sets

# isort: split
from textual import events
from textual.screen import Screen

from benchmarks.long_run import write_run
from benchmarks.results import write_result
from launcher.runs.events import LogEvent, SampleEvent, StartEvent, to_line
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.training_job import TrainingJob
from launcher.tui import app, cards
from launcher.tui.pauses import shorten_pauses
from launcher.tui.screens.run import POLL_SECONDS, RunScreen
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

MODEL, CARD, SIZE = "qwen2.5-14b", "16GB", (120, 40)
GIB = 2**30
OPEN_BAR_SECONDS, KEY_BAR_SECONDS, MEMORY_BAR_BYTES = 1.0, 0.1, 200 * 10**6
FLOW_EVENTS, FLOW_SECONDS, KEY_EVERY_SECONDS = 10_000, 10.0, 0.1
HOLDER = """
import fcntl, os, sys
held = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
fcntl.flock(held, fcntl.LOCK_EX)
os.write(held, f"{os.getpid()}\\n".encode())
print("held", flush=True)
sys.stdin.read()
"""


class TimedApp(app.VramwiseApp):
    """Notes when each frame was painted."""

    CSS_PATH = Path(app.__file__).with_name("app.tcss")
    painted: list[float]

    def _display(self, screen: Screen[Any], renderable: Any) -> None:
        super()._display(screen, renderable)
        self.painted.append(time.perf_counter())


class TimedRun(RunScreen):
    """Notes when a key was answered."""

    answered: list[float]

    def action_warnings(self) -> None:
        super().action_warnings()
        self.answered.append(time.perf_counter())


def timed_app() -> TimedApp:
    timed = TimedApp(
        model=resolve_model(MODEL),
        card=cards.card_from_text(CARD),
        setup=TrainingSetup(model=MODEL, max_length=4096, gradient_accumulation_steps=16),
        runs_root=Path("runs"),
    )
    timed.painted = []
    return timed


@contextlib.contextmanager
def held_lock(folder: RunFolder) -> Any:
    """A process that holds the trainer's lock, as a trainer that lives does."""
    path = folder.lock_file("trainer")
    path.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield
    finally:
        child.kill()
        child.wait()


def empty_run(root: Path) -> RunFolder:
    job = TrainingJob(
        setup=TrainingSetup(model=MODEL, max_length=4096, gradient_accumulation_steps=16),
        model_source="m",
        data_path="d.jsonl",
        max_steps=10**6,
    )
    folder = create_run_folder(root, job, name="run")
    folder.events.write_text(to_line(StartEvent(time=1.7e9, total_steps=10**6, environment={})))
    return folder


async def open_long(folder: RunFolder) -> dict[str, Any]:
    """Seconds of the wall and of the processor until the end of the run is painted."""
    timed = timed_app()
    async with timed.run_test(size=SIZE) as pilot:
        await timed.workers.wait_for_complete()
        await pilot.pause(0.2)
        begun, used = time.perf_counter(), time.process_time()
        screen = RunScreen(folder)
        await timed.push_screen(screen)
        shown = await _until(lambda: screen.snapshot is not None and timed.painted[-1] > begun)
        over = await _until(lambda: screen.snapshot is not None and screen.snapshot.over)
        done = await _until(lambda: timed.painted[-1] > over)
        snapshot = screen.snapshot
        assert snapshot is not None
        return {
            "first_figures_seconds": round(shown - begun, 3),
            "wall_seconds": round(done - begun, 3),
            "cpu_seconds": round(time.process_time() - used, 3),
            "events_counted": snapshot.event_count,
            "points_of_the_loss": len(snapshot.losses),
        }


async def flow(root: Path) -> dict[str, Any]:
    """Seconds from each key to its answer and to the paint of it, and how many events were counted."""
    folder, timed = empty_run(root), timed_app()
    with held_lock(folder):
        async with timed.run_test(size=SIZE) as pilot:
            await timed.workers.wait_for_complete()
            screen = TimedRun(folder)
            screen.answered = []
            await timed.push_screen(screen)
            await pilot.pause(0.5)
            pressed: list[float] = []
            loop = asyncio.get_running_loop()

            def press() -> None:
                end = time.perf_counter() + FLOW_SECONDS
                while time.perf_counter() < end:
                    time.sleep(KEY_EVERY_SECONDS)
                    pressed.append(time.perf_counter())
                    loop.call_soon_threadsafe(timed.post_message, events.Key("w", "w"))

            # The writer is another process, as the trainer is.
            writer = subprocess.Popen([sys.executable, "-m", __spec__.name, "write", str(folder.path)])
            keys = threading.Thread(target=press)
            keys.start()
            while writer.poll() is None or keys.is_alive():
                await asyncio.sleep(0.05)
            await pilot.pause(1.0)
            snapshot = screen.snapshot
            assert snapshot is not None
            assert len(screen.answered) == len(pressed)
            painted = [min(at for at in timed.painted if at >= one) for one in screen.answered]
            return {
                "events": FLOW_EVENTS + 1,
                "events_counted": snapshot.event_count,
                "last_step": snapshot.step,
                "keys": len(pressed),
                "key_to_answer": _figures([b - a for a, b in zip(pressed, screen.answered, strict=True)]),
                "key_to_paint": _figures([b - a for a, b in zip(pressed, painted, strict=True)]),
            }


def write(folder: RunFolder) -> None:
    """FLOW_EVENTS events in FLOW_SECONDS, each with a write of its own."""
    begun = time.perf_counter()
    with folder.events.open("ab", buffering=0) as file:
        for step in range(1, FLOW_EVENTS + 1):
            file.write(to_line(_log(step)).encode())
            wait = begun + step * FLOW_SECONDS / FLOW_EVENTS - time.perf_counter()
            if wait > 0.002:
                time.sleep(wait)


async def hour(root: Path, minutes: float) -> dict[str, Any]:
    """The peak of resident memory after so many minutes of a run, and how it was on the way."""
    folder, timed = empty_run(root), timed_app()
    polls, every = int(minutes * 60 / POLL_SECONDS), round(1 / POLL_SECONDS)
    held = []
    with held_lock(folder):
        async with timed.run_test(size=SIZE) as pilot:
            await timed.workers.wait_for_complete()
            screen = RunScreen(folder)
            await timed.push_screen(screen)
            await pilot.pause(0.5)
            begun = time.perf_counter()
            for poll in range(polls):
                if poll % every == 0:
                    second = poll // every + 1
                    with folder.events.open("a") as file, folder.samples.open("a") as samples:
                        file.write(to_line(_log(second)))
                        samples.write(to_line(_sample(second)))
                    with folder.log("trainer").open("a") as output:
                        output.write(f"step {second} of a run that prints a line a step\n")
                before = screen.snapshot
                screen.poll()
                await _until(lambda was=before: screen.snapshot is not was)
                if poll % round(app.COLLECT_SECONDS / POLL_SECONDS) == 0:
                    timed.collect_if_idle()
                if poll % (polls // 6) == 0:
                    held.append(resident_bytes())
            snapshot = screen.snapshot
            assert snapshot is not None
            assert snapshot.step == polls // every
            return {
                "minutes": minutes,
                "polls": polls,
                "seconds_a_poll": round((time.perf_counter() - begun) / polls, 4),
                "resident_bytes_on_the_way": held,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def falling(step: int) -> float:
    """A loss that gives no advice, so that every rule is asked to the end."""
    return 1.0 + 1.4 * math.exp(-step / 2e5) + 0.3 * random.random()


def _log(step: int) -> LogEvent:
    return LogEvent(
        time=1.7e9 + step,
        step=step,
        loss=falling(step),
        learning_rate=1e-4 * random.random(),
        grad_norm=random.random(),
        tokens_per_second=1500 * random.random(),
        step_seconds=random.random(),
        num_tokens=step * 4096,
        epoch=step / 1000,
    )


def _sample(second: int) -> SampleEvent:
    return SampleEvent(
        time=1.7e9 + second,
        used_bytes=int((13 + random.random()) * GIB),
        total_bytes=16 * GIB,
        process_bytes=13 * GIB,
        utilization_percent=90 + 10 * random.random(),
        temperature_c=60 + 10 * random.random(),
        power_w=170 + 10 * random.random(),
    )


async def _until(wanted: Any) -> float:
    end = time.perf_counter() + 60
    while not wanted():
        if time.perf_counter() > end:
            raise TimeoutError("the screen did not come to it")
        await asyncio.sleep(0.004)
    return time.perf_counter()


def _figures(seconds: list[float]) -> dict[str, float]:
    return {"median_seconds": round(statistics.median(seconds), 4), "worst_seconds": round(max(seconds), 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="what a child does: open, flow or hour, and where")
    parser.add_argument("--events", type=int, default=10**6)
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    if args.part:
        return _part(args.part[0], Path(args.part[1]), args.minutes)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as root:
        long = write_run(Path(root), args.events - 1000 - 6, falling)
        found = {"open": [_child("open", long.path, args.minutes) for _ in range(3)]}
    for name in ("flow", "hour"):
        with tempfile.TemporaryDirectory() as root:
            found[name] = _child(name, Path(root), args.minutes)
    passed = (
        max(one["wall_seconds"] for one in found["open"]) < OPEN_BAR_SECONDS
        and found["flow"]["events_counted"] == found["flow"]["events"]
        and found["flow"]["key_to_paint"]["worst_seconds"] < KEY_BAR_SECONDS
        and found["hour"]["peak_bytes"] < MEMORY_BAR_BYTES
    )
    write_result(
        "tui_run",
        {
            "screen": f"run, {SIZE[0]} x {SIZE[1]}",
            "load_average_before": round(load, 2),
            "niceness": os.nice(0),
            "open_bar_seconds": OPEN_BAR_SECONDS,
            "key_bar_seconds": KEY_BAR_SECONDS,
            "memory_bar_bytes": MEMORY_BAR_BYTES,
            **found,
            "passed": passed,
        },
    )
    print(json.dumps(found, indent=2))
    return 0 if passed else 1


def _part(name: str, path: Path, minutes: float) -> int:
    if name == "write":
        write(RunFolder(path))
        return 0
    shorten_pauses()
    todo = {"open": lambda: open_long(RunFolder(path)), "flow": lambda: flow(path)}
    found = asyncio.run(todo[name]() if name in todo else hour(path, minutes))
    print(json.dumps(found))
    return 0


def _child(name: str, path: Path, minutes: float) -> Any:
    command = [sys.executable, "-m", __spec__.name, name, str(path), "--minutes", str(minutes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
