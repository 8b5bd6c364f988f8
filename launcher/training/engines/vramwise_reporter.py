"""Tells the launcher what a training script does: copied beside the script, and run by that one's Python.

Nothing of vramwise is imported here, and of others nothing before `callback` is called: some trainers have to
be imported before all that they change. A line of JSON each goes into the open file that `VRAMWISE_REPORT`
names. SIGUSR1 asks for an end after the step.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import sys
import time
from importlib import metadata
from typing import Any

PACKAGES = (
    *("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"),
    *("unsloth", "unsloth_zoo", "xformers", "triton"),
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

_stop_asked = False
_usual_hook = sys.excepthook


def tell(kind: str, **values: Any) -> None:
    """Write a line; who reads has ended where that fails, and this process ends by it."""
    line = json.dumps({"kind": kind, **values}) + "\n"
    os.write(int(os.environ["VRAMWISE_REPORT"]), line.encode("utf-8"))


def _ask_for_stop(number: int, frame: object) -> None:
    global _stop_asked
    _stop_asked = True


def _tell_error(kind: Any, error: BaseException, trace: Any) -> None:
    text = str(error)
    is_memory = (
        kind.__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY))
    )
    tell("error", name=kind.__name__, message=text[:1500], out_of_memory=is_memory)
    _usual_hook(kind, error, trace)


signal.signal(signal.SIGUSR1, _ask_for_stop)
sys.excepthook = _tell_error


class Reporter:
    """Steps, losses and peaks of memory as they come; ends the training when asked to."""

    torch: Any = None
    on_gpu = False
    tokens = 0
    mark = 0.0
    seconds = 0.0
    steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce the training."""
        _tell_memory(self.torch, self.on_gpu, "load", 0)
        device = self.torch.cuda.get_device_name() if self.on_gpu else "cpu"
        tell("start", total_steps=state.max_steps, environment=_environment(self.torch, device))
        self.mark = time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that a micro-step is done."""
        tell("beat", step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Count the step."""
        now = time.perf_counter()
        self.seconds, self.mark, self.steps = self.seconds + now - self.mark, now, self.steps + 1
        _tell_memory(self.torch, self.on_gpu, "step", state.global_step)
        if _stop_asked:
            control.should_training_stop = control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell means since the last log.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        told = logs.get("num_tokens") or state.num_input_tokens_seen
        tokens = int(told) if told else None
        rate = None
        if tokens is not None and self.seconds > 0:
            rate = (tokens - self.tokens) / self.seconds
        tell(
            "log",
            step=state.global_step,
            loss=loss if math.isfinite(loss) else None,
            learning_rate=_number(logs.get("learning_rate")),
            grad_norm=_number(logs.get("grad_norm")),
            tokens_per_second=rate,
            step_seconds=self.seconds / self.steps if self.steps else None,
            num_tokens=tokens,
            epoch=state.epoch,
        )
        self.seconds, self.steps, self.tokens = 0.0, 0, tokens or 0
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that what follows is saving."""
        tell("trained", step=state.global_step)


def callback() -> Any:
    """What transformers' Trainer is to call."""
    import torch
    from transformers import TrainerCallback

    told = type("Callback", (Reporter, TrainerCallback), {})()
    told.torch, told.on_gpu = torch, torch.cuda.is_available()
    tell("stage", message="preparing the data")
    return told


def _tell_memory(torch: Any, on_gpu: bool, phase: str, step: int) -> None:
    allocated = reserved = None
    if on_gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
    tell("memory", phase=phase, step=step, allocated_bytes=allocated, reserved_bytes=reserved)


def _environment(torch: Any, device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "device": device, "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)
