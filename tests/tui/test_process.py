"""The interface as a process: what it imports, and how it leaves the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "pandas")


def test_planner_and_sizing_import_no_training_stack() -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from launcher.tui import cards
from launcher.tui.app import VramwiseApp
from launcher.tui.screens.sizing import SizingScreen
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup

async def main():
    app = VramwiseApp(model=resolve_model("qwen2.5-14b"), card=cards.card_from_text("16GB"),
        setup=TrainingSetup(model="qwen2.5-14b", max_length=4096), runs_root=Path("runs"))
    async with app.run_test() as pilot:
        await pilot.press("right", "a", "m", "escape", "g", "escape", "c")
        await app.workers.wait_for_complete()
        assert isinstance(app.screen, SizingScreen) and app.screen.sizing is not None

asyncio.run(main())
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=500
    )
    assert done.stdout.strip() == "[]"


APP = """
import argparse
from launcher.commands import tui
parser = argparse.ArgumentParser()
tui.add_arguments(parser)
raise SystemExit(tui.run(parser.parse_args(["--gpu", "16GB"])))
"""


def read_until(descriptor: int, wanted: bytes, seconds: float) -> bytes:
    """Output up to and with `wanted`, or all there is when the other side closes or time runs out."""
    found = b""
    deadline = time.monotonic() + seconds
    while wanted not in found and time.monotonic() < deadline:
        if not select.select([descriptor], [], [], 0.2)[0]:
            continue
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        found += piece
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_the_terminal(number: signal.Signals) -> None:
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(other)
    process = subprocess.Popen(
        [sys.executable, "-c", APP],
        cwd=ROOT,
        stdin=other,
        stdout=other,
        stderr=other,
        env={**os.environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    try:
        # Textual writes to stderr; the verdict is there once the first answer is shown.
        shown = read_until(main, b"FITS", 300)
        assert b"\x1b[?1049h" in shown
        os.kill(process.pid, number)
        rest = read_until(main, b"\x1b[?25h", 200)
        for restored in (b"\x1b[?1049l", b"\x1b[?1003l", b"\x1b[?25h"):
            assert restored in rest
        assert process.wait(500) == 128 + number
        assert termios.tcgetattr(other)[3] == before[3]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(main)
        os.close(other)


def test_without_a_terminal_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", APP],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=500,
    )
    assert "needs a terminal" in done.stderr
