"""Which attention a setup runs, and whether its checkpoints keep what that computes."""

from __future__ import annotations

from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

KEPT_IMPLEMENTATIONS = ("sdpa", "flash_attention_2")
"""Those whose kernels TRL's policy of selective checkpointing names: torch's own of sdpa, and flash-attn's
(trl/models/selective_activation_checkpointing.py, policy_fn). Flex attention and eager's products are
recomputed as everything else is."""

SKIPS_MASKED = ("flash_attention_2", "flex_attention")
"""Those that compute no pair of tokens that a mask hides. SDPA does so only without a mask tensor."""


def attention_implementation(setup: TrainingSetup, model: ModelSpec) -> str:
    """The attention that runs: the setup's, else what transformers picks for the model."""
    return setup.attn_implementation or model.default_attn_implementation


def keeps_attention(setup: TrainingSetup, model: ModelSpec) -> bool:
    """Whether selective checkpointing keeps attention's output and log-sum-exp, and so computes them once."""
    return setup.selective_checkpointing and attention_implementation(setup, model) in KEPT_IMPLEMENTATIONS
