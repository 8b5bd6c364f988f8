"""Defaults that a plan chooses by: length, learning rate, schedule."""

from __future__ import annotations

from planner.data.lengths import DatasetStats
from planner.models.spec import ModelSpec
from planner.setup.objective import SFT, Objective

# Tried in this order without --data.
DEFAULT_LENGTHS = (4096, 2048, 1024, 512)
SHORTEST_LENGTH = DEFAULT_LENGTHS[-1]
"""The shortest length that is chosen for a person: below, most of an example would be cut."""
COVERAGE_PERCENT = 99.0
# Lengths chosen from data are rounded up to this: matmuls waste part of a tile on other sizes.
LENGTH_STEP = 64

OPTIM = "adamw_8bit"
"""The states of paged_adamw_8bit, but in torch's allocator, where the forecast is exact: paged ones lie in
managed memory, which the driver holds in chunks of 128 MiB and Windows' Linux subsystem cannot page."""
FASTER_OPTIM = "adamw_torch_fused"
"""Updates all adapters with a few kernels where adamw_8bit launches one for each tensor: on the H100 9 ms
instead of 27 for Llama-3.1-8B (20261122-44d45cd4170f, 20261122-5145ff451a63). Its states have the adapters'
dtype. A search takes it in OPTIM's place.
"""

# What fine-tuning guides use with LoRA: 2e-4 for 7B to 8B, 1e-4 from 14B; the line is drawn above 10B, so
# that sizes in between get the lower rate. QLoRA's own runs used 2e-4 up to 13B and 1e-4 for 33B and 65B
# (arXiv:2305.14314, table 9).
LORA_LEARNING_RATE = 2e-4
LORA_LEARNING_RATE_LARGE = 1e-4
LARGE_MODEL_PARAMETERS = 10_500_000_000
# Full fine-tuning wants about a tenth of LoRA's rate (https://thinkingmachines.ai/blog/lora).
FULL_SHARE_OF_LORA_RATE = 0.1

# What an adapter can hold against what the data says, as https://thinkingmachines.ai/blog/lora estimates it:
# about 2 bits a parameter (arXiv:2404.05405) and about 1 bit a token in the loss.
BITS_PER_PARAMETER = 2
BITS_PER_TOKEN = 1
HIGHER_RANKS = (64, 32)
RANK_RULE = "2 bits a parameter, 1 bit a token in the loss"

EPOCHS = 3.0
LR_SCHEDULER_TYPE = "cosine"
WARMUP_RATIO = 0.03

SAVE_MINUTES = 10.0
"""Between checkpoints, where nothing else is asked for: what a fault costs at most, beside loading anew."""
KEPT_CHECKPOINTS = 2
"""Kept at least: with one, the moment in which it turns out to be broken loses all."""


def learning_rate(method: str, model: ModelSpec, objective: Objective = SFT) -> float:
    """Learning rate by method and model size; those of other tasks are what TRL shows them in use with."""
    if objective.rates is not None:
        return objective.rates[method != "full"]
    large = model.parameter_count > LARGE_MODEL_PARAMETERS
    rate = LORA_LEARNING_RATE_LARGE if large else LORA_LEARNING_RATE
    return rate * FULL_SHARE_OF_LORA_RATE if method == "full" else rate


def lengths(model: ModelSpec, fixed: object, stats: DatasetStats | None) -> tuple[int, ...]:
    """Lengths to try, the wished one first.

    A fixed length stands alone. With data, the first covers COVERAGE_PERCENT of the examples; shorter default
    lengths follow it. No length is above what the model was made for.
    """
    if isinstance(fixed, int):
        return (fixed,)
    longest = model.max_position_embeddings
    if stats is None:
        return tuple(length for length in DEFAULT_LENGTHS if length <= longest) or (longest,)
    wished = min(longest, -(-stats.percentile(COVERAGE_PERCENT) // LENGTH_STEP) * LENGTH_STEP)
    return (wished, *(length for length in DEFAULT_LENGTHS if length < wished))


def ranks(loss_tokens: int, parameters: int, rank: int) -> tuple[int, ...]:
    """Ranks above `rank` that data asks for, the highest first; none where `rank` holds it.

    `parameters` are the adapter's at `rank`, which its size is proportional to. The lowest rank that holds
    the data is enough; where none does, the highest is wished.
    """
    needed = loss_tokens * BITS_PER_TOKEN / BITS_PER_PARAMETER
    enough = [higher for higher in HIGHER_RANKS if parameters * higher / rank >= needed]
    highest = min(enough, default=max(HIGHER_RANKS))
    if parameters >= needed:
        return ()
    return tuple(higher for higher in HIGHER_RANKS if rank < higher <= highest)
