"""The wait of several machines for each other, by torchrun's static rendezvous: bounded, and left on request.

torchrun waits in C++, where no signal reaches Python: a thread looks for the request.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from launcher.runs.ends import RunExit
from launcher.runs.events import StageEvent, append_event
from launcher.runs.folder import RunFolder
from launcher.runs.minding import stopping
from launcher.runs.training_job import TrainingJob
from planner.base.errors import InputError

MEETING_SECONDS = 600
"""How long machines wait for each other: torchrun's own (static_tcp_rendezvous.py), told so that an end of it
can be named. Within it the same command is started on each by hand."""
LOOK_SECONDS = 0.2
STOPPED = "stopped while waiting for the other machines; nothing was trained"


def resolve(job: TrainingJob) -> None:
    """See that the host of the endpoint is one.

    Raises:
        InputError: its name stands for no address.
    """
    host, _, port = (job.rdzv_endpoint or "").rpartition(":")
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(f"--rdzv-endpoint {job.rdzv_endpoint}: no such host or port ({error})") from error


def missed(job: TrainingJob, error: Exception) -> str:
    """What is said where they have not met: what torch says, and what it is mostly for."""
    why = str(error).strip().partition("\n")[0].rstrip(".")
    if job.node_rank:
        mend = "is the run with --node-rank 0 started, and is this how its machine is reached?"
    else:
        mend = f"all are to be started within {MEETING_SECONDS // 60} min, with an endpoint of this machine"
    return f"the machines did not meet at {job.rdzv_endpoint} ({why}): {mend}"


def bound(folder: RunFolder, job: TrainingJob) -> None:
    """Have torchrun's wait for the other machines told, and left as soon as the run is asked to end."""
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    meet = StaticTCPRendezvous.next_rendezvous

    def meet_unless_asked(handler: StaticTCPRendezvous) -> object:
        others = "another machine" if job.nnodes == 2 else f"{job.nnodes - 1} other machines"
        message = f"waiting for {others} at {job.rdzv_endpoint}, {MEETING_SECONDS // 60} min at most"
        append_event(folder.events, StageEvent(time=time.time(), stage="loading", message=message))
        with _left_on_request(folder):
            return meet(handler)

    StaticTCPRendezvous.next_rendezvous = meet_unless_asked


@contextlib.contextmanager
def _left_on_request(folder: RunFolder) -> Iterator[None]:
    """End this process, which has started no rank yet, when the run is asked to end."""
    met = threading.Event()

    def look() -> None:
        while not met.wait(LOOK_SECONDS):
            if stopping.asked(folder) is not None:
                print(STOPPED, file=sys.stderr, flush=True)
                os._exit(RunExit.STOPPED_SAVED)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        met.set()
