"""A model whose output head gives one score, as transformers' classes for sequence classification have it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from planner.models.parameter import Parameter
from planner.models.spec import ModelSpec

SCORE = "score.weight"
"""transformers modeling_layers.py, GenericForSequenceClassification."""


@lru_cache(maxsize=256)
def scored(model: ModelSpec) -> ModelSpec:
    """The model with such a head in the place of the vocabulary's, whose weights are not loaded."""
    body = tuple(part for part in model.parameters if not part.is_output_head)
    head = Parameter(name=SCORE, module_class="Linear", shape=(1, model.hidden_size), count=1)
    return replace(model, parameters=(*body, head), tied_embeddings=False)


def is_scored(model: ModelSpec) -> bool:
    """Whether its head gives a score."""
    return model.parameters[-1].name == SCORE
