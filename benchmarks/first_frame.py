"""From the start of a process to its first frame: the interface beside Textual's own smallest application.

Used by benchmarks.tui_latency. The interface opens a model folder that takes 15 s to describe, which a
stand-in for the inspector sleeps through: what counts is what is drawn before.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

BAR_SECONDS = 0.6
TIMES, WAIT_SECONDS = 7, 60.0
HELLO = """
from textual.app import App
from textual.widgets import Static

class Hello(App):
    def compose(self):
        yield Static("hello, world")

Hello().run()
"""
INTERFACE = """
import argparse, sys, time
from launcher.commands import tui
from launcher.tui import inspection
from planner.base.errors import InputError

def slow(*arguments, **named):
    time.sleep(15)
    raise InputError("described")

inspection.inspector = slow
parser = argparse.ArgumentParser()
tui.add_arguments(parser)
raise SystemExit(tui.run(parser.parse_args(["--gpu", "16GB", "--model", sys.argv[1]])))
"""


def first_frames() -> dict[str, Any]:
    """Wall and processor seconds to the first frame of both, in turn, and by how much they differ."""
    found: dict[str, list[tuple[float, float]]] = {"hello": [], "interface": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text('{"model_type": "unheard-of", "architectures": ["New"]}')
        for _ in range(TIMES):
            found["hello"].append(_first_frame([HELLO], b"hello"))
            found["interface"].append(_first_frame([INTERFACE, folder], b"reading"))
    walls, used = (
        {name: statistics.median(one[at] for one in ones) for name, ones in found.items()} for at in (0, 1)
    )
    return {
        "bar_seconds": BAR_SECONDS,
        "times": TIMES,
        "hello_seconds": round(walls["hello"], 3),
        "interface_seconds": round(walls["interface"], 3),
        "later_seconds": round(walls["interface"] - walls["hello"], 3),
        "hello_cpu_seconds": round(used["hello"], 3),
        "interface_cpu_seconds": round(used["interface"], 3),
        "later_cpu_seconds": round(used["interface"] - used["hello"], 3),
    }


def _first_frame(arguments: list[str], wanted: bytes) -> tuple[float, float]:
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=other, stdout=other, stderr=other, start_new_session=True
    )
    os.close(other)
    seen = b""
    while wanted not in seen:
        left = begun + WAIT_SECONDS - time.perf_counter()
        if left <= 0 or not select.select([main], [], [], left)[0]:
            raise TimeoutError(f"no frame came: {seen[-500:]!r}")
        seen += os.read(main, 2**16)
    shown = time.perf_counter() - begun
    os.kill(child.pid, signal.SIGKILL)
    _, _, used = os.wait4(child.pid, 0)
    child.returncode = -signal.SIGKILL
    os.close(main)
    return shown, used.ru_utime + used.ru_stime
