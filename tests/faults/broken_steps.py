"""The training process with a step that fails, in place of `python -m launcher.training.train`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BROKEN_AFTER = 3
"""Steps that are done when one fails."""


def train(run: Path, break_step: Callable[[], None] | None) -> int:
    """Train a run with its steps as they are, or broken; returns the exit code."""
    from launcher.training.train import main

    if break_step is not None:
        break_step()
    return main([str(run)])


def finds_packages_in(folder: str) -> None:
    """Have a folder's packages found before those that are installed."""
    sys.path.insert(0, folder)


def raises(kind: str) -> None:
    """Make a step raise an error of ERRORS."""

    def fail(trainer: Any) -> None:
        raise ERRORS[kind]()

    _before_a_step(fail)


def loses_a_gradient() -> None:
    """Make the adapter's first gradient not a number amid a step, after it has drawn random numbers."""
    from launcher.training.callbacks import LaunchedTrainer

    clip = LaunchedTrainer._clip_grad_norm

    def broken(self: Any, model: Any) -> Any:
        if self.state.global_step == BROKEN_AFTER:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return clip(self, model)

    LaunchedTrainer._clip_grad_norm = broken


def loses_a_weight() -> None:
    """Make the adapter's first weight not a number before a step."""

    def poison(trainer: Any) -> None:
        weight = next(p for p in trainer.model.parameters() if p.requires_grad)
        weight.data.fill_(float("nan"))

    _before_a_step(poison)


def dies_after(step: int) -> None:
    """Kill the process when a step begins after that many are done."""

    def die(trainer: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    _before_a_step(die, after=step)


def does_after(step: int, action: Callable[[], object]) -> None:
    """Do something when a step begins after that many are done."""
    _before_a_step(lambda trainer: action(), after=step)


def _cuda() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "CUDA": _cuda,
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "Python": MemoryError,
    "bug": lambda: KeyError("lost"),
}


def _before_a_step(action: Callable[[Any], None], after: int = BROKEN_AFTER) -> None:
    from launcher.training.callbacks import LaunchedTrainer

    step = LaunchedTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == after:
            action(self)
        return step(self, *args, **kwargs)

    LaunchedTrainer.training_step = training_step


def runs_out_beyond(largest: int) -> None:
    """Let memory run out in steps of larger micro-batches, once BROKEN_AFTER steps are done."""

    def fail(trainer: Any) -> None:
        if trainer.args.per_device_train_batch_size > largest:
            raise ERRORS["CUDA"]()

    _before_a_step(fail)
