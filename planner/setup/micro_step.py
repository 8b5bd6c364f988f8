"""The shape of a micro-step: how many tokens go through the layers at once, and how large attention is."""

from __future__ import annotations

from planner.base.units import DTYPE_WIDTH, FP32
from planner.base.values import dataclass
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroStep:
    """One forward and backward pass of a setup.

    `tokens` go through the layers, `rows` of them have a label; `scores` are the elements of one head's
    attention matrices, `positions` the length of the rotary tables; `stream_width` is the bytes of an element
    of the embeddings' output.
    """

    tokens: int
    rows: int
    scores: int
    positions: int
    stream_width: int


def micro_step(setup: TrainingSetup) -> MicroStep:
    """Shape of a setup's micro-steps, sequences full.

    Packed sequences are flattened into one row (TRL's padding-free batches, sft_trainer.py:916), so that
    attention that is given a mask spans all of their tokens. PEFT's k-bit preparation holds what is not
    quantised in fp32.
    """
    sequences, length = setup.sequences_per_micro_step, setup.max_length
    tokens = sequences * length
    return MicroStep(
        tokens=tokens,
        rows=tokens - sequences * setup.objective.unlabelled_tokens,
        scores=tokens**2 if setup.packing else sequences * length**2,
        positions=tokens if setup.packing else length,
        stream_width=FP32 if setup.prepare_for_kbit_training else DTYPE_WIDTH[setup.dtype],
    )
