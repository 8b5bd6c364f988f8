"""An output head of one score a token, trained in full (transformers modeling_layers.py,
GenericForSequenceClassification): what its passes hold beside scores, of which there are few.
"""

from __future__ import annotations

from planner.memory.held.head import HeadMemory, HeadShape


def score_memory(shape: HeadShape) -> HeadMemory:
    """Memory of the head for a micro-step beyond what the final norm has kept, and what it leaves.

    The normed hidden states are its product's input, which the weight's gradient asks for. Backward has the
    whole of their gradient beside them: what is read at last tokens alone is spread over all of them.
    """
    hidden = shape.tokens * shape.hidden_size
    normed = hidden * shape.hidden_width
    cast = hidden * shape.compute_width if shape.hidden_width != shape.compute_width else 0
    return HeadMemory(
        forward_bytes=normed + cast,
        backward_bytes=normed + cast + hidden * shape.compute_width,
        gradient_bytes=shape.hidden_size * shape.weight_width,
        kept_bytes=normed + cast,
    )
