"""Output head and loss where all logits are there at once: transformers' own loss, as its Trainer calls it.

In mixed precision a micro-step's logits come in the compute dtype, the loss takes an fp32 copy and keeps its
log-softmax for backward, and accelerate hands a second fp32 copy on; backward has two gradients of that size
beside the log-softmax. Of each token and entry of the vocabulary 10 bytes are there in forward and 12 in
backward at 16 bits. Sources: transformers/loss/loss_utils.py (ForCausalLMLoss, fixed_cross_entropy),
accelerate/utils/operations.py (convert_to_fp32), aten/src/ATen/native/LossNLL.cpp; traced through
Trainer.training_step by tests/stack/test_stacks.py.
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.held.head import HeadMemory, HeadShape


def logits_bytes(shape: HeadShape, width: int) -> int:
    """All logits of a micro-step: no token is left out, whether it has a label or not."""
    return shape.tokens * shape.vocab_size * width


def logits_memory(shape: HeadShape) -> HeadMemory:
    """Memory of the head for a micro-step beyond what the final norm has kept, and what it leaves."""
    hidden = shape.tokens * shape.hidden_size
    normed = hidden * shape.hidden_width
    made, wide = logits_bytes(shape, shape.compute_width), logits_bytes(shape, FP32)
    copies = made + wide if shape.narrows else 0
    gradient = shape.hidden_size * shape.vocab_size * shape.weight_width if shape.trained else 0
    held = normed if shape.trained else 0
    product = made + hidden * shape.compute_width + gradient
    return HeadMemory(
        forward_bytes=normed + casts_bytes(shape) + wide + copies,
        backward_bytes=held + casts_bytes(shape) + max(3 * wide, product),
        gradient_bytes=gradient,
        kept_bytes=wide,
    )


def casts_bytes(shape: HeadShape) -> int:
    """Copies of hidden states and weight in the compute dtype, whole, where they have another."""
    hidden = shape.tokens * shape.hidden_size * shape.compute_width
    weight = shape.hidden_size * shape.vocab_size * shape.compute_width
    found = hidden if shape.hidden_width != shape.compute_width else 0
    return found + (weight if shape.weight_width != shape.compute_width else 0)
