"""Makes docs/images: `python -m tests.tui.screenshots`. Trains the demo on the CPU for the run screen.

Writes SVG, and PNG where cairosvg is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import Input
from textual.worker import WorkerCancelled

from launcher.tui import cards
from launcher.tui.app import VramwiseApp
from launcher.tui.inspection import inspector
from launcher.tui.measured.calibrating import FittedRun, Heard
from launcher.tui.screens.calibrate import CalibrateScreen
from launcher.tui.screens.run import RunScreen
from planner.base.data_files import PROFILES, user_data_dir
from planner.calibration.records import read_records
from planner.models.catalog import resolve_model
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

SIZE = (120, 40)
STEPS = 100
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
DEMO = PROFILES / "demo"
_TEXT = re.compile(r"<text ([^>]*)>([^<]*)</text>")
_CELL = 12.2


async def main() -> None:
    """Write all pictures."""
    # Warnings of the training stack name this machine's folders.
    os.environ["PYTHONWARNINGS"] = "ignore"
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_DATA_HOME"] = folder
        await _sizing(_chats(Path(folder)))
        await _measured()
        # So that the picture names no folder of this machine.
        os.chdir(folder)
        await _run()


def _chats(folder: Path) -> Path:
    """Five thousand chats whose lengths are spread as people's are."""
    draw, path = random.Random(3), folder / "chats.jsonl"
    with path.open("w") as file:
        for _ in range(5000):
            letters = max(20, int(draw.lognormvariate(7.3, 0.9)))
            turns = (("user", "q" * (letters // 3)), ("assistant", "a" * letters))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


async def _sizing(data: Path) -> None:
    app = VramwiseApp(
        model=resolve_model("qwen2.5-14b"),
        card=cards.card_from_text("16GB"),
        setup=TrainingSetup(
            model="qwen2.5-14b", max_length=4096, gradient_accumulation_steps=16, optim=defaults.OPTIM
        ),
        automatic=True,
        runs_root=Path("runs"),
        data=str(data),
    )
    async with app.run_test(size=SIZE) as pilot:
        await _settle(pilot)
        await _settle(pilot)
        _save(app, "sizing")
        await pilot.press("n")
        await _settle(pilot)
        await pilot.press("h", "8", "enter")
        await _settle(pilot)
        _save(app, "needs")


async def _measured() -> None:
    """Runs of a calibration of an H200, which are shipped, as they are shown to who made them."""
    own = user_data_dir() / "runs" / "calibrate.jsonl"
    own.parent.mkdir(parents=True)
    shutil.copy(PROFILES / "runs" / "calibrate-h200.jsonl", own)
    app = VramwiseApp(
        model=resolve_model("qwen2.5-14b"),
        card=cards.card_from_text("h200"),
        setup=TrainingSetup(model="qwen2.5-14b", max_length=4096, optim=defaults.OPTIM),
        runs_root=Path("runs"),
    )
    async with app.run_test(size=SIZE) as pilot:
        await _settle(pilot)
        await pilot.press("escape", "e")
        await _settle(pilot)
        _save(app, "accuracy")
        await pilot.press("b")
        await _settle(pilot)
        screen, found = app.screen, list(_residuals(own))
        for at, run in enumerate(found, 1):
            screen.post_message(CalibrateScreen.Said(Heard(f"{run.model}: ok", at, len(found))))
        screen.post_message(CalibrateScreen.Ended(tuple(found), ""))
        await _settle(pilot)
        _save(app, "calibrate")


def _residuals(path: Path) -> Iterator[FittedRun]:
    """Predicted over measured of each run that was predicted before it was measured."""
    for record in read_records(path):
        step, told = record.phase("step"), record.predicted
        if step is None or told is None or step.reserved_bytes is None or step.allocated_bytes is None:
            continue
        yield FittedRun(
            model=record.setup.model,
            allocated=told.allocated_bytes / step.allocated_bytes - 1,
            reserved=told.reserved_bytes / step.reserved_bytes - 1,
            process=None,
        )


async def _run() -> None:
    model = DEMO / "model"
    app = VramwiseApp(
        model=resolve_model(str(model), inspector=inspector),
        card=cards.card_from_text("16GB"),
        # Few processors without a GPU have bfloat16 units.
        setup=TrainingSetup(model=str(model), max_length=128, per_device_train_batch_size=8, dtype="float32"),
        runs_root=Path("runs"),
        data=str(DEMO / "data" / "train.jsonl"),
    )
    async with app.run_test(size=SIZE) as pilot:
        await _settle(pilot)
        await pilot.press("t")
        await _settle(pilot)
        app.screen.query_one("#start-steps", Input).value = str(STEPS)
        await pilot.press("ctrl+s")
        await _settle(pilot)
        screen = app.screen
        assert isinstance(screen, RunScreen)
        deadline = time.monotonic() + 900
        while screen.snapshot is None or screen.snapshot.step < STEPS * 0.7:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        app.clear_notifications()
        await pilot.pause()
        _save(app, "run")


async def _settle(pilot: Pilot[None]) -> None:
    for _ in range(3):
        # What a later change overtakes is cancelled.
        with contextlib.suppress(WorkerCancelled):
            await pilot.app.workers.wait_for_complete()
        await pilot.pause()


def _save(app: VramwiseApp, name: str) -> None:
    svg = app.export_screenshot(title="vramwise tui")
    # Fonts come from the reader's machine, not from a server.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "'Fira Code', Menlo, Consolas, 'DejaVu Sans Mono'")
    (IMAGES / f"{name}.svg").write_text(svg)
    if importlib.util.find_spec("cairosvg") is None:
        print("cairosvg is not installed: no PNG", file=sys.stderr)
        return
    png = _TEXT.sub(_single_cells, svg).replace(
        "'Fira Code', Menlo, Consolas, 'DejaVu Sans Mono'", "DejaVu Sans Mono"
    )
    cairosvg = importlib.import_module("cairosvg")
    cairosvg.svg2png(bytestring=png.encode(), write_to=str(IMAGES / f"{name}.png"), scale=1.0)


def _single_cells(match: re.Match[str]) -> str:
    """Split text with braille or half blocks into cells, since few mono fonts draw both without gaps."""
    attributes, text = match[1], match[2].replace("&#160;", " ")
    if not any(0x2800 <= ord(c) < 0x2900 or c == "▌" for c in text):
        return match[0]
    x = float(re.search(r'\bx="([\d.]+)"', attributes)[1])  # type: ignore[index]
    y = float(re.search(r'\by="([\d.]+)"', attributes)[1])  # type: ignore[index]
    rest = re.sub(r'\b(x|textLength)="[\d.]+" ?', "", attributes)
    parts = []
    for index, character in enumerate(text):
        left = x + index * _CELL
        if character == "▌":
            shape = re.sub(r'\by="[\d.]+" ?', "", rest)
            parts.append(
                f'<rect {shape} x="{left:.1f}" y="{y - 18.5:.1f}" width="{_CELL / 2}" height="24.65"/>'
            )
        elif character != " ":
            style = (
                ' style="font-family:DejaVu Sans;font-size:16px"' if 0x2800 <= ord(character) < 0x2900 else ""
            )
            parts.append(f'<text {rest} x="{left:.1f}"{style}>{character}</text>')
    return "".join(parts)


if __name__ == "__main__":
    asyncio.run(main())
