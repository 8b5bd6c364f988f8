"""From key press to the changed figure on the sizing screen: `python -m benchmarks.tui_latency`.

Drives the screen without a terminal (Textual's Pilot) and takes the time of the first paint with another
figure in the verdict's line, which includes Textual's frame of 1/60 s. Once with pauses, so that nothing else
is at work, once with a key every 150 ms, so that the changes before are being refined meanwhile; and with
pauses once more with data of 100,000 examples of many lengths loaded.
Then the first frame of the interface, beside that of Textual's smallest application (benchmarks.first_frame).
Writes benchmarks/results/tui_latency.json. On a machine with other work: `nice -n -12`, with
/proc/sys/kernel/sched_autogroup_enabled at 0, without which niceness counts within a session only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launcher.tui  # noqa: F401 - before Textual, whose frame rate it sets

# isort: split
from textual._compositor import CompositorUpdate
from textual.pilot import Pilot
from textual.screen import Screen
from textual.worker import WorkerCancelled

from benchmarks import first_frame
from benchmarks.results import write_result
from launcher.tui import app, cards
from launcher.tui.pauses import shorten_pauses
from launcher.tui.screens.sizing import SizingScreen
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

MODEL, CARD, SIZE = "qwen2.5-14b", "16GB", (120, 40)
BAR_SECONDS = 0.050
KEY_EVERY_SECONDS = 0.15
WAIT_SECONDS = 5.0
EXAMPLES = 100_000
PRESSES = {
    "max_length": ("right", "right", "right", "left", "left", "left"),
    "per_device_train_batch_size": ("right", "right", "right", "left", "left", "left"),
    "lora_r": ("right", "right", "left", "left"),
    "lora_dropout": ("right", "left"),
    "target_modules": ("right", "left"),
    "optim": ("left", "right"),
    "gradient_checkpointing": ("right", "left"),
    "selective_checkpointing": ("right", "left"),
    "compile": ("right", "left"),
    "kernels": ("right", "left"),
}
"""30 changes, each of which changes the figure, and all of which together change nothing."""
_FIGURE = re.compile(r"([\d.,]+)(?: GiB)?, at most ([\d.,]+)")


class TimedApp(app.VramwiseApp):
    """Notes every paint that holds the verdict's figure, with its time and whether it is refined."""

    CSS_PATH = Path(app.__file__).with_name("app.tcss")
    painted: list[tuple[float, tuple[str, str], bool, float]]

    def _display(self, screen: Screen[Any], renderable: Any) -> None:
        super()._display(screen, renderable)
        if not isinstance(renderable, CompositorUpdate):
            return
        text = renderable.render_segments(self.console)
        found = _FIGURE.search(text)
        if found is not None:
            figures = found[1], found[2]
            self.painted.append((time.perf_counter(), figures, "refining" not in text, time.process_time()))


def write_data(path: Path) -> None:
    """Examples whose lengths are spread as those of chats are: half below 150 tokens, some of thousands."""
    draw = random.Random(7)
    with path.open("w") as file:
        for _ in range(EXAMPLES):
            letters = max(8, int(draw.lognormvariate(6.4, 1.0)))
            file.write(json.dumps({"prompt": "p" * (letters // 2), "completion": "c" * letters}) + "\n")


async def measure(*, pause: bool, data: str = "") -> tuple[list[float], list[float], list[float]]:
    """Seconds to the changed figure and, with pauses, to the refined one, for each of the presses; then the
    processor's seconds of all threads to the changed figure, which other work on the machine delays less.
    """
    timed = TimedApp(
        model=resolve_model(MODEL),
        card=cards.card_from_text(CARD),
        setup=TrainingSetup(model=MODEL, max_length=4096, gradient_accumulation_steps=16),
        runs_root=Path("runs"),
        data=data,
    )
    timed.painted = []
    async with timed.run_test(size=SIZE) as pilot:
        await _idle(pilot)
        await _idle(pilot)
        first = timed.screen
        assert isinstance(first, SizingScreen)
        assert first.sizing is not None
        assert (first.sizing.run is not None) == bool(data)
        changed, refined, used = [], [], []
        for field, key in _presses():
            screen = timed.screen
            assert isinstance(screen, SizingScreen)
            screen.query_one(f"#knob-{field}").focus()
            await (_idle(pilot) if pause else asyncio.sleep(KEY_EVERY_SECONDS))
            before, seen = timed.painted[-1][1], len(timed.painted)
            start, begun = time.perf_counter(), time.process_time()
            await pilot.press(key)
            answer = await _first(timed, seen, lambda one, was=before: one[1] != was)
            changed.append(answer[0] - start)
            used.append(answer[3] - begun)
            if pause:
                refined.append((await _first(timed, seen, lambda one: one[2]))[0] - start)
    return changed, refined, used


def _presses() -> Iterator[tuple[str, str]]:
    for field, keys in PRESSES.items():
        for key in keys:
            yield field, key


async def _idle(pilot: Pilot[None]) -> None:
    for _ in range(2):
        # What a later change overtakes is cancelled.
        with contextlib.suppress(WorkerCancelled):
            await pilot.app.workers.wait_for_complete()
        await pilot.pause(0.05)


async def _first(timed: TimedApp, seen: int, wanted: Any) -> Any:
    """The first paint after the `seen` ones that is wanted."""
    end = time.perf_counter() + WAIT_SECONDS
    while time.perf_counter() < end:
        for one in timed.painted[seen:]:
            if wanted(one):
                return one
        await asyncio.sleep(0.001)
    raise TimeoutError("the figure did not change")


def _figures(seconds: list[float]) -> dict[str, Any]:
    return {
        "median_seconds": round(statistics.median(seconds), 4),
        "worst_seconds": round(max(seconds), 4),
        "seconds": [round(value, 4) for value in seconds],
    }


def main() -> int:
    load = os.getloadavg()[0]
    frame = first_frame.first_frames()
    shorten_pauses()
    changed, refined, used = asyncio.run(measure(pause=True))
    busy, *_ = asyncio.run(measure(pause=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples.jsonl"
        write_data(path)
        with_data, with_run, used_with_data = asyncio.run(measure(pause=True, data=str(path)))
    write_result(
        "tui_latency",
        {
            "screen": f"sizing, {MODEL} on {CARD}, {SIZE[0]} x {SIZE[1]}",
            "changes": len(changed),
            "bar_seconds": BAR_SECONDS,
            "load_average_before": round(load, 2),
            "niceness": os.nice(0),
            "first_frame": frame,
            "key_to_figure": _figures(changed),
            "key_to_figure_cpu": _figures(used),
            "key_to_figure_while_refining": _figures(busy),
            "key_to_refined_figure": _figures(refined),
            "examples": EXAMPLES,
            "key_to_figure_with_data": _figures(with_data),
            "key_to_figure_cpu_with_data": _figures(used_with_data),
            "key_to_refined_figure_with_data": _figures(with_run),
        },
    )
    for name, seconds in (
        ("idle", changed),
        ("while refining", busy),
        ("to the refined figure", refined),
        ("with data", with_data),
        ("processor, idle", used),
        ("processor, with data", used_with_data),
        ("to the whole run", with_run),
    ):
        print(
            f"{name}: median {statistics.median(seconds) * 1000:.0f} ms, worst {max(seconds) * 1000:.0f} ms"
        )
    print(f"first frame: {frame['later_seconds']:.2f} s after hello's")
    late = frame["later_seconds"] > first_frame.BAR_SECONDS
    return int(max(*changed, *with_data) > BAR_SECONDS or late)


if __name__ == "__main__":
    sys.exit(main())
