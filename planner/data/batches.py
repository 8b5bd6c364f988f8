"""How long the longest example of a batch is, which is what padding makes of the others."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from planner.base.values import dataclass
from planner.data.lengths import DatasetStats, Padding

FINE = 480
"""Equally likely batches that stand for all random ones; a multiple of COARSE."""
COARSE = 6
"""Kinds of batches that a step's time is taken of, each the mean of as many."""
GROUP_STEPS, LEAST_GROUPS = 50, 4
"""transformers/trainer_pt_utils.py, get_length_grouped_indices: examples are sorted within random groups of
50 optimizer steps, or of fewer so that there are four groups."""
DRAWN = 4000
"""Examples drawn for a picture of such groups: their batches' mean length is then within 2% of the truth."""


@dataclass(frozen=True, slots=True)
class BatchLength:
    """Longest example of some of the batches: its mean, and the share of batches that it stands for."""

    longest: float
    share: float


class Lengths:
    """Lengths of a dataset's examples that are trained, truncated."""

    def __init__(self, stats: DatasetStats, max_length: int) -> None:
        kept = stats.clipped(max_length)
        self.cut = kept[-1][1] if kept[-1][0] == max_length else 0
        self._lengths = [length for length, _ in kept]
        self._up_to = list(accumulate(count for _, count in kept))
        self.examples = self._up_to[-1]
        self.tokens = sum(length * count for length, count in kept)
        self._grouped: dict[int, list[list[int]]] = {}

    def at(self, share: float) -> int:
        """Length that so large a share of the examples do not exceed."""
        return self._lengths[min(bisect_left(self._up_to, share * self.examples), len(self._lengths) - 1)]

    def random_batches(self, batch_size: int) -> tuple[BatchLength, ...]:
        """Batches drawn at random: the longest of a batch is below a length where all of its examples are."""
        power = 1.0 / min(batch_size, self.examples)
        return _coarse([self.at(((index + 0.5) / FINE) ** power) for index in range(FINE)])

    def grouped_batches(self, batch_size: int, step_size: int) -> tuple[BatchLength, ...]:
        """Batches of transformers' `group_by_length`, `step_size` examples an optimizer step."""
        longest: list[int] = []
        for group in self._groups(step_size):
            longest += group[::batch_size]
        return _coarse(sorted(longest))

    def _groups(self, step_size: int) -> list[list[int]]:
        """Random groups of examples' lengths, the longest first, as the sampler would make them."""
        found = self._grouped.get(step_size)
        if found is None:
            steps = min(self.examples // (step_size * LEAST_GROUPS), GROUP_STEPS) or 1
            found = self._grouped[step_size] = [
                sorted(epoch[start : start + steps * step_size], reverse=True)
                for epoch in self._epochs(steps * step_size)
                for start in range(0, len(epoch), steps * step_size)
            ]
        return found

    def _epochs(self, group_size: int) -> Iterator[list[int]]:
        """Orders of a small dataset's lengths, or one order of some of a large one's; always the same."""
        generator = random.Random(0)
        if self.examples > DRAWN:
            count = math.ceil(DRAWN / group_size) * group_size
            yield [self.at(generator.random()) for _ in range(count)]
            return
        every = [self.at((index + 0.5) / self.examples) for index in range(self.examples)]
        for _ in range(math.ceil(DRAWN / self.examples)):
            generator.shuffle(every)
            yield list(every)


def padding(lengths: Lengths, batches: tuple[BatchLength, ...]) -> Padding:
    """What padding to the longest of each batch costs over an epoch."""
    expected = sum(batch.longest * batch.share for batch in batches)
    return Padding(
        real_tokens=lengths.tokens,
        processed_tokens=max(lengths.tokens, round(expected * lengths.examples)),
        expected_longest=expected,
    )


def _coarse(rising: list[int]) -> tuple[BatchLength, ...]:
    """Means of neighbours, as many as COARSE."""
    found = []
    for index in range(COARSE):
        part = rising[index * len(rising) // COARSE : (index + 1) * len(rising) // COARSE]
        if part:
            found.append(BatchLength(sum(part) / len(part), len(part) / len(rising)))
    return tuple(found)
