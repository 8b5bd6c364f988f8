"""A frozen embedding that lies in the host's memory: only the rows of a batch go to the GPU.

Gathered by FSDP2 it would take twice its size for a moment (the flat buffer and the copy), and half of it
for good: of a 70B's 2 GiB. The rows of 512 tokens are 8 MiB.
"""

from __future__ import annotations

from typing import Any

import torch


def keep_on_host(embedding: torch.nn.Module, device: torch.device) -> None:
    """Have an embedding, whose weight lies in host memory, look up there and hand its rows to `device`."""

    def ids_to_host(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(one.to("cpu") for one in inputs)

    def rows_to_device(module: torch.nn.Module, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(device)

    embedding.register_forward_pre_hook(ids_to_host)
    embedding.register_forward_hook(rows_to_device)
