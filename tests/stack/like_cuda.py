"""What a CPU does otherwise than a GPU, made alike on one side or the other, for tests that compare bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from planner.memory.decoder import groups, live_bytes
from planner.memory.layers import base_weight


def native_dropout(self: Any, x: Any) -> Any:
    """Dropout as CUDA runs it: one kernel whose boolean mask is kept."""
    return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x


@contextmanager
def like_cuda() -> Iterator[None]:
    """Dropout and autocast as on a GPU; no scratch buffers in the model, which the CPU does not take.

    PEFT asks whether CUDA's autocast is on (tuners/lora/bnb.py, requires_conversion).
    """
    with pytest.MonkeyPatch.context() as patch:
        enabled = torch.is_autocast_enabled
        patch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled(device))
        patch.setattr(torch.nn.Dropout, "forward", native_dropout)
        patch.setattr(base_weight, "REDUCTION_WIDTH", 0)
        forget_replays()
        yield
    forget_replays()


def forget_replays() -> None:
    """Forget what was replayed with other scratch buffers."""
    for known in (
        live_bytes.layer_memory,
        live_bytes.final_norm_memory,
        live_bytes._forward,
        groups.groups_of,
    ):
        known.cache_clear()
