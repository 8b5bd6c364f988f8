"""Which attention a run has: the implementation, the kernel of each kind of layer, and the masks they get."""

from __future__ import annotations

from collections.abc import Iterable

from planner.models.spec import LayerSpec, ModelSpec
from planner.setup.training_setup import TrainingSetup

ATTENTION_KERNELS = ("fused", "masked", "math", "eager", "batched_eager", "flex")
"""sdpa's: flash or memory-efficient without a mask, memory-efficient with one, and torch's own in fp32 with
shared keys; eager attention's products of one row and of several; flex attention's compiled one."""
SKIPS_MASKED = ("flash_attention_2", "flex_attention")
"""Those that compute no pair of tokens that a mask hides. SDPA does so only without a mask tensor."""


def attention_implementation(setup: TrainingSetup, model: ModelSpec) -> str:
    """The attention that runs: the setup's, else what transformers picks for the model."""
    return setup.attn_implementation or model.default_attn_implementation


def gets_mask(setup: TrainingSetup, window: int | None, *, padded: bool) -> bool:
    """Whether sdpa is given a mask tensor in layers with that sliding window (null for none): for padded and
    packed batches, and where the window is shorter than the sequence (transformers masking_utils.py,
    sdpa_mask; integrations/sdpa_attention.py:43-52).
    """
    return padded or setup.packing or (window is not None and window < setup.max_length)


def mask_windows(
    setup: TrainingSetup, layers: Iterable[LayerSpec], implementation: str, *, padded: bool
) -> tuple[int | None, ...]:
    """Masks of a micro-step by their sliding window (null for none): one for each kind of layer that needs
    one. Eager attention adds one to the scores whatever the batch.
    """
    kinds = {layer.sliding_window for layer in layers if layer.attends}
    windows = tuple(sorted(kinds, key=lambda window: (window is not None, window)))
    if implementation == "eager":
        return windows
    if implementation != "sdpa":
        return ()
    return tuple(window for window in windows if gets_mask(setup, window, padded=padded))


def attention_kernel(setup: TrainingSetup, layer: LayerSpec, implementation: str, *, padded: bool) -> str:
    """Which of ATTENTION_KERNELS runs in layers of that kind.

    Without a mask torch repeats shared keys itself, in flash attention (16 bits) alone (sdpa_attention.py,
    use_gqa_in_sdpa).
    """
    if implementation == "eager":
        several = setup.sequences_per_micro_step > 1 and not setup.packing
        return "batched_eager" if several else "eager"
    if implementation == "flex_attention":
        return "flex"
    if implementation == "sdpa" and gets_mask(setup, layer.sliding_window, padded=padded):
        return "masked"
    shared = layer.num_attention_heads != layer.num_key_value_heads
    if implementation == "sdpa" and setup.dtype == "float32" and shared:
        return "math"
    return "fused"
