"""The ranks of a run: which one this process is, and what they tell each other beside the training itself.

What is told goes over the CPU (gloo), so that it neither waits for the GPU nor takes memory of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from launcher.runs.ends import RunExit

WAIT = timedelta(days=30)
"""How long a collective may take: the heartbeat tells work that takes long from work that stands still
(launcher/runs/minding/hang.py), and a full disk is waited for without an end."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count`: its `rank` of all and its `local_rank` on this machine."""

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def saves(self) -> bool:
        """Whether this rank writes checkpoints and the adapter."""
        return self.rank == 0

    @property
    def tells(self) -> bool:
        """Whether this rank writes its machine's run folder."""
        return self.local_rank == 0

    def exchange(self, *values: int) -> list[tuple[int, ...]]:
        """The values of every rank, in their order; every rank must ask at the same place."""
        if self.alone:
            return [values]
        import torch
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return [tuple(one.tolist()) for one in found]

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return flag if self.alone else any(told for (told,) in self.exchange(int(flag)))

    def wait(self) -> None:
        """Go on when all are here."""
        self.exchange(0)

    def agree(self, texts: Sequence[str]) -> list[str]:
        """What rank 0 says."""
        if self.alone:
            return list(texts)
        import torch
        import torch.distributed as dist

        said: list[Any] = [list(texts) if self.rank == 0 else None]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return list(said[0])


ALONE = Ranks()
AGENT = "VRAMWISE_AGENT_PID"
"""What the agent tells the ranks that it starts: its own process."""
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""


def asked_ranks() -> Ranks:
    """The rank that torchrun has made this process; ALONE where it was not torchrun that started it."""
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(name in os.environ for name in variables):
        return ALONE
    return Ranks(*(int(os.environ[name]) for name in variables))


def join(ranks: Ranks, *, on_gpu: bool) -> None:
    """Join the others: NCCL for what lies on GPUs, gloo for the rest."""
    if ranks.alone:
        return
    import torch
    import torch.distributed as dist

    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAIT)


def end_with_parent() -> None:
    """Have the kernel end this process with the one that started it: torchrun's agent may be killed, and
    gives each rank a session of its own. Linux alone can. Where that one is gone already, of which no kernel
    tells any more, this process ends here.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    agent = os.environ.get(AGENT)
    if agent is not None and agent != str(os.getppid()):
        sys.exit(RunExit.KILLED)


def let_cpus_shard() -> None:
    """Have accelerate shard over CPUs: it looks for GPUs by name (accelerate/state.py, AcceleratorState), and
    nothing behind that needs one. To be called between the trainer's arguments and the trainer.
    """
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
