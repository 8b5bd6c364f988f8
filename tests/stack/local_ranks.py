"""Ranks of a process group on this machine, forked, and what each of them has written."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import forks

RANKS = 2


def measured(rank_of: Callable[[str], Any], folder: Path, *, seconds: float) -> list[dict[str, Any]]:
    """What `rank_of(folder)` has written into rankN.json, for each rank; one that fails ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(RANKS):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in own.items()}}
        log = folder / f"log{rank}"
        processes.append(forks.start(rank_of, str(folder), output=log, environment=environment))
    for rank, process in enumerate(processes):
        process.join(seconds)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise AssertionError((folder / f"log{rank}").read_text(encoding="utf-8")[-3000:])
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(RANKS)]
