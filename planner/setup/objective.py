"""Objective: what is learned from an example, as far as memory and speed depend on it.

One for each trainer of TRL 1.16 that a plan knows, by its `task`.
"""

from __future__ import annotations

from types import MappingProxyType

from planner.base.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A loss and the passes that it takes.

    `sequences_per_example` go through the model for one example of a batch, and of each the first
    `unlabelled_tokens` have no label. Beside the pass that learns, `policy_passes` of the model as it is
    trained and `reference_passes` of the model that training began with run forward alone and keep nothing:
    those before, these while everything that is kept for backward is there. `mixes_lengths` says that the
    sequences of a batch differ in length whatever the data, so that they are padded; `drops_out` that
    adapters' dropout is left on; `scores` that a head of one output, trained in full, is in the place of the
    vocabulary's. `examples` is what several are called, and `rates` the learning rates of all weights and of
    an adapter (null: by method and model size).
    """

    name: str
    examples: str = "sequences"
    rates: tuple[float, float] | None = None
    sequences_per_example: int = 1
    unlabelled_tokens: int = 1
    policy_passes: int = 0
    reference_passes: int = 0
    mixes_lengths: bool = False
    drops_out: bool = True
    scores: bool = False

    @property
    def compares(self) -> bool:
        """Whether it asks a reference, the model that training began with."""
        return self.reference_passes > 0


SFT = Objective(name="sft")
"""Next-token prediction: a sequence an example, whose first token nothing predicts."""

DPO = Objective(
    name="dpo",
    examples="pairs",
    # What its script shows in use (trl/scripts/dpo.py).
    rates=(5e-7, 5e-6),
    # The chosen and the rejected answer of a pair, one batch (dpo_trainer.py, DataCollatorForPreference).
    sequences_per_example=2,
    # dpo_trainer.py, _compute_loss: the reference's pass comes after the policy's.
    reference_passes=1,
    mixes_lengths=True,
    # dpo_config.py, disable_dropout.
    drops_out=False,
)
"""Direct preference optimisation (arXiv:2305.18290). Of all that two answers have tokens labels are counted:
those of a prompt have none, so that the head works on less."""

KTO = Objective(
    name="kto",
    # trl/scripts/kto.py
    rates=(5e-7, 5e-7),
    # kto_trainer.py, _compute_loss: other examples' answers to a prompt, for the divergence, first; after
    # the pass that learns, the reference's of these and of the batch's own.
    policy_passes=1,
    reference_passes=2,
    drops_out=False,
)
"""Kahneman-Tversky optimisation (arXiv:2402.01306), with the loss of its name: answers, each good or bad."""

REWARD = Objective(
    name="reward",
    examples="pairs",
    # reward_config.py, learning_rate; a tenth for all weights, as of supervised fine-tuning.
    rates=(1e-5, 1e-4),
    sequences_per_example=2,
    mixes_lengths=True,
    drops_out=False,
    scores=True,
)
"""A reward model of pairs: sequence classification with one output, read at a sequence's last token."""

TASKS = MappingProxyType({objective.name: objective for objective in (SFT, DPO, KTO, REWARD)})
"""Objectives by the name that `task` has for them."""
