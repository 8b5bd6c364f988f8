"""Of all setups that fit on a card and keep the effective batch, the one that is done first.

The space is ways to batch examples of many lengths and to execute layers (strategies.py) x micro-batches
(batches.py) x what each layer keeps (levels.py), the length and the knobs that a person fixed being given.
Memory left over is speed left behind: where a micro-batch fits with every layer checkpointed and not with
none, as many layers as fit go without. Where a choice is to be confirmed, the fitted estimate only prunes:
the fastest are replayed through the allocator, one after the other, until one fits (choice.py).
"""

from __future__ import annotations

from planner.search.batches import Batch, batches
from planner.search.choice import SPEED_TIE, SearchResult, Tried, fastest, finish_seconds
from planner.search.find import TOKENS, search
from planner.search.levels import fewest_layers
from planner.search.strategies import COMPILED, EAGER, Mode, modes

__all__ = [
    "COMPILED",
    "EAGER",
    "SPEED_TIE",
    "TOKENS",
    "Batch",
    "Mode",
    "SearchResult",
    "Tried",
    "batches",
    "fastest",
    "fewest_layers",
    "finish_seconds",
    "modes",
    "search",
]
