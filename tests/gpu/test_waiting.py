"""`vramwise train --wait`: a GPU whose memory another process holds, and one on which another run trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.commands.demo import DEMO, SETTINGS
from planner.base.errors import ExitCode

pytestmark = pytest.mark.gpu

LEFT_BYTES = 400 * 2**20
"""Less than the demo's run needs."""
HOLD = f"""
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - {LEFT_BYTES}, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


def command(runs: Path, name: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launcher.cli", "train", f"--name={name}", f"--runs={runs}"),
        *(f"--model={DEMO / 'model'}", f"--data={DEMO / 'data' / 'train.jsonl'}", *SETTINGS[:3]),
        *("--epochs=1", "--compile=none", *more),
    ]


@contextmanager
def started(arguments: list[str], own: Path) -> Iterator[subprocess.Popen[str]]:
    """A process whose two outputs are one; it is ended with the block."""
    environment = {**os.environ, "VRAMWISE_DATA_DIR": str(own), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    child = subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def until(child: subprocess.Popen[str], words: str) -> str:
    """What it says up to the line that has these words."""
    said = ""
    for line in child.stdout or ():
        print(line, end="")
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was not said in:\n{said}")


def test_a_run_waits_for_memory_that_another_process_holds(tmp_path: Path) -> None:
    with started([sys.executable, "-c", HOLD], tmp_path) as holder:
        until(holder, "held")
        with started(command(tmp_path, "refused", "--max-steps=4"), tmp_path) as refused:
            assert "--wait waits until it is free" in until(refused, "--wait")
            refused.communicate()
            assert refused.returncode == ExitCode.DOES_NOT_FIT
        with started(command(tmp_path, "waits", "--wait", "--max-steps=4"), tmp_path) as child:
            assert f"process {holder.pid}" in until(child, "waiting until it is free")
            holder.communicate()
            until(child, "Finished after 4 steps")


def test_a_run_waits_for_the_end_of_another(tmp_path: Path) -> None:
    with started(command(tmp_path, "first", "--max-steps=150"), tmp_path) as first:
        until(first, "loading the weights")
        with started(command(tmp_path, "second", "--wait", "--max-steps=4"), tmp_path) as second:
            until(second, "waiting for its end")
            until(first, "Finished after 150 steps")
            until(second, "Finished after 4 steps")
