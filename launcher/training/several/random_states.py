"""Sources of random numbers that training draws from, and what a checkpoint holds of each rank's.

A rank's file has the form of transformers' for one process: Python's, numpy's and torch's own generators, and
that of this process's GPU. (transformers' own for several has the generators of all GPUs that a process sees,
of which it has drawn from one, and cannot be read by another number of processes.)
"""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

from planner.base.errors import InputError

ONE_PROCESS = "rng_state.pth"
"""Where one process has its random numbers (transformers/trainer.py); rank 0's are there too."""
_RANKS = re.compile(r"rng_state_(\d+)\.pth")


def random_state() -> tuple[Any, ...]:
    """The state of every source of random numbers that training draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Go back to a state of random_state()."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])


def file_of(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rng_state_{rank}.pth"


def as_file() -> bytes:
    """The content of this process's file."""
    python, numpy, cpu, cuda = random_state()
    states = {"python": python, "numpy": numpy, "cpu": cpu}
    content = io.BytesIO()
    torch.save(states if cuda is None else {**states, "cuda": cuda}, content)
    return content.getvalue()


def restore(checkpoint: Path, rank: int) -> None:
    """Go on with what a checkpoint holds of a rank.

    A rank that was not there, since fewer trained, takes the state of rank `rank` modulo their number: at a
    run's start too all ranks have one state (transformers' set_seed), and what they then draw depends on
    their rows. A GPU where the checkpoint is the CPU's keeps its own.

    Raises:
        InputError: the checkpoint holds none.
    """
    ranks = sorted(int(found[1]) for path in checkpoint.iterdir() if (found := _RANKS.fullmatch(path.name)))
    path = checkpoint / (file_of(ranks[rank % len(ranks)]) if ranks else ONE_PROCESS)
    try:
        with safe_globals():
            states = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except FileNotFoundError as error:
        raise InputError(f"{path}: the checkpoint has no random states") from error
    cuda = states.get("cuda") if torch.cuda.is_available() else None
    set_random_state((states["python"], states["numpy"], states["cpu"], cuda))
