"""A trainer that kills itself at a chosen file operation of its saves."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

SAVES = ("/.saving", "/checkpoint", "/.removed", "/.adapter.partial", "/adapter", "/.probe")
WRITERS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
"""Audit events (https://docs.python.org/3/library/audit_events.html) of operations by Python itself; those of
torch.save and safetensors are counted before and after."""


def dies_at(operation: int) -> None:
    """Kill this process at that file operation of its saves, counted from 1; with 0 print each."""
    import torch
    from peft import peft_model

    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        if operation == 0:
            print(f"operation {done}", flush=True)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITERS or not any(sign in str(arguments[0]) for sign in SAVES):
            return
        # The flags of open: reading changes nothing.
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count()

    def around(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            result = real(*args, **kwargs)
            count()
            return result

        setattr(owner, name, call)

    for owner, name in ((torch, "save"), (peft_model, "safe_save_file"), (os, "fsync")):
        around(owner, name)
    sys.addaudithook(audit)
