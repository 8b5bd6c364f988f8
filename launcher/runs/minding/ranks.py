"""Several ranks of a run, as its keeper sees them: which are alive, and why the first one died.

Each rank but the one that writes the run folder tells its end in a file of its own, and the agent (torchrun)
tells which processes ended how. Light: no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder
from launcher.runs.locks import live_pid
from launcher.runs.minding.deaths import signal_name

DEATHS = ".deaths.json"
MOST_LOCAL = 16
"""GPUs of one machine that are looked for where it is not known how many a run has."""
_FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A rank's process that ended otherwise than well: `code` is negative for a signal."""

    rank: int
    pid: int
    code: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnd:
    """What a rank said of its end."""

    rank: int
    time: float
    state: str
    message: str
    step: int
    room_bytes: int | None = None


def lock_name(local_rank: int) -> str:
    """The lock that a rank of this machine holds; the first one is the run's trainer."""
    return "trainer" if local_rank == 0 else f"rank-{local_rank}"


def live_ranks(folder: RunFolder, count: int) -> dict[int, int]:
    """pids of the ranks of this machine that are alive, by their local rank."""
    found = {local: live_pid(folder, lock_name(local)) for local in range(count)}
    return {local: pid for local, pid in found.items() if pid is not None}


def send(pids: Mapping[int, int], number: int) -> None:
    """Send a signal to all of them."""
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stacks_file(folder: RunFolder, local_rank: int) -> Path:
    """Where a rank writes the stacks of its threads, so that those of several do not mix."""
    return folder.path / f".stacks-{local_rank}"


def collect_stacks(folder: RunFolder, pids: Mapping[int, int]) -> None:
    """Append all ranks' stacks to the trainer's log, each under its name."""
    with folder.log("trainer").open("ab") as log:
        for local, pid in sorted(pids.items()):
            path = stacks_file(folder, local)
            try:
                content = path.read_bytes()
            except OSError:
                content = b""
            told = content or b"it wrote none: it stands still within the kernel\n"
            log.write(f"\nstacks of local rank {local} (process {pid}):\n".encode() + told)


def clear(folder: RunFolder) -> None:
    """Before an attempt: forget what ranks of the one before have told."""
    for path in (folder.path / DEATHS, *folder.path.glob(".end-*"), *folder.path.glob(".stacks-*")):
        path.unlink(missing_ok=True)


def tell_end(folder: RunFolder, end: RankEnd) -> None:
    """Write down how a rank ended, for the keeper."""
    with contextlib.suppress(OSError):
        (folder.path / f".end-{end.rank}").write_text(json.dumps(asdict(end)), encoding="utf-8")


def tell_deaths(folder: RunFolder, deaths: list[Death]) -> None:
    """Write down which ranks died, in their order, for the keeper."""
    content = json.dumps([asdict(death) for death in deaths])
    with contextlib.suppress(OSError):
        (folder.path / DEATHS).write_text(content, encoding="utf-8")


def first_to_fail(folder: RunFolder, count: int) -> RankEnd | None:
    """Which of `count` ranks ended the run and how, as far as one can tell; None where nothing was told.

    A rank killed by a signal comes first: the others fail because it is gone. Then what a rank knows to be
    its own, as memory that ran out; then the first that failed.
    """
    deaths = [Death(**values) for values in _read(folder.path / DEATHS) or []]
    ends = sorted(_ends(folder), key=lambda end: end.time)
    for death in deaths:
        # SIGTERM is how torchrun ends the others.
        if death.code < 0 and death.code != -signal.SIGTERM:
            how = signal_name(-death.code)
            message = f"rank {death.rank} of {count} (process {death.pid}) was ended by {how}"
            return RankEnd(rank=death.rank, time=time.time(), state="killed", message=message, step=0)
    own = [end for end in ends if end.state != _FAILED] or ends
    if not own:
        return None
    message = f"rank {own[0].rank} of {count}: {own[0].message}"
    return RankEnd(**{**asdict(own[0]), "message": message})


def _ends(folder: RunFolder) -> list[RankEnd]:
    found = [_read(path) for path in folder.path.glob(".end-*")]
    return [RankEnd(**values) for values in found if values]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
