"""Small catalog models, one of each layout of a dense decoder layer that runs sdpa."""

from __future__ import annotations

DENSE = (
    "llama-3.2-1b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "gemma-3-1b",
    "phi-4-mini",
    "olmo-2-1b",
    "granite-3.3-2b",
)
