"""Runs of several ranks on this machine's CPU, forked like those of one process, without torchrun."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from launcher.runs.folder import RunFolder
from planner.setup.training_setup import TrainingSetup
from tests.faults import small_runs


def shared(setup: TrainingSetup, way: str, count: int = 2) -> TrainingSetup:
    """A setup whose micro-batches `count` processes share; the effective batch is the same."""
    micro_batch = setup.per_device_train_batch_size // count
    return dataclasses.replace(
        setup, num_processes=count, distributed=way, per_device_train_batch_size=micro_batch
    )


def start(run: RunFolder, count: int = 2, prepare: Callable[[], None] | None = None) -> list[BaseProcess]:
    """Start the ranks of a run, each after what a test has prepared in it."""
    variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def environment(rank: int) -> dict[str, str]:
        return {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}

    return [small_runs.start(run, prepare, environment=environment(rank)) for rank in range(count)]


def trained(run: RunFolder, count: int = 2, prepare: Callable[[], None] | None = None) -> list[int | None]:
    """Train to the end; the exit codes."""
    return [small_runs.code_of(rank) for rank in start(run, count, prepare)]


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def figures(run: RunFolder, name: str) -> list[Any]:
    """A figure of every logged step."""
    from launcher.runs.events import LogEvent

    return [getattr(event, name) for event in small_runs.events_of(run, LogEvent)]
