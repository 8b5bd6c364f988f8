"""Processes with the training stack, forked from one that has imported it: to import it takes 8 s of CPU.

What such a process does is its own: its memory, signals, exit code, environment and output. How the program
starts its processes is not tested this way.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])

_started: list[BaseProcess] = []


def start(
    function: Callable[..., int],
    *arguments: Any,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a process that exits with what `function` returns; what it prints is added to `output`.

    Its environment is this process's unless one is given.
    """
    given = dict(os.environ if environment is None else environment)
    process = _CONTEXT.Process(target=_child, args=(function, arguments, output, given))
    process.start()
    _started.append(process)
    return process


def kill_what_is_left() -> None:
    """End what a failed test left running: it would take the time of all others."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            process.kill()


def _child(
    function: Callable[..., int], arguments: tuple[Any, ...], output: Path, environment: dict[str, str]
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(function(*arguments))
