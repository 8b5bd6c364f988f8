"""What compiling a run's layers costs once, before it pays."""

from __future__ import annotations

from planner.training_setup import TrainingSetup

COMPILE_SECONDS = 30.0
"""The first step beyond a usual one: 9 to 29 s in the 11 runs of profiles/runs/compiled-h100-80gb.jsonl, on a
host with 16 cores; two graphs (the first layer has one of its own) for training."""
FLEX_SECONDS = 40.0
"""The same for flex attention, whose kernels transformers compiles at the first call: 30 and 53 s in the two
runs of profiles/runs that use it."""


def compile_seconds(setup: TrainingSetup) -> float:
    """Seconds that compilation adds to a run."""
    layers = COMPILE_SECONDS if setup.compile != "none" else 0.0
    return layers + (FLEX_SECONDS if setup.attn_implementation == "flex_attention" else 0.0)
