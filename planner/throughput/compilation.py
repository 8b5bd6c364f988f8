"""What compiling a run's layers costs once, before it pays."""

from __future__ import annotations

from planner.setup.training_setup import TrainingSetup

COMPILE_SECONDS = 30.0
"""The first step beyond a usual one: 9 to 29 s in the 11 runs of profiles/runs/compiled-h100-80gb.jsonl, on a
host with 16 cores; two graphs (the first layer has one of its own) for training."""
FLEX_SECONDS = 50.0
"""The same for flex attention between eager layers, whose kernels transformers compiles at the first call:
30, 46 and 53 s in three runs of profiles/runs, and 282 s in 20261123-5301d29bd0b1. In compiled layers they
are part of the layers' graph: 16, 20 and 33 s in the runs of chat-h100-80gb.jsonl."""


def compile_seconds(setup: TrainingSetup) -> float:
    """Seconds that compilation adds to a run."""
    if setup.compile != "none":
        return COMPILE_SECONDS
    return FLEX_SECONDS if setup.attn_implementation == "flex_attention" else 0.0
