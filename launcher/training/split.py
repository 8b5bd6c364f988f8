"""Which examples of the data are evaluated on and not trained: a seeded choice, made again by a resumed run.

Light: no torch.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from planner.base.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Split:
    """What of the data is evaluated on: `wanted` below 1 is a share of the examples, else their number.

    The choice follows from the examples, their order and `seed` alone, never from max_length or the batch, so
    that a run that goes on with another setup evaluates on the same examples.
    """

    wanted: float
    seed: int

    def evaluated(self, keys: Sequence[bytes], source: str) -> frozenset[int]:
        """Places of the examples to evaluate on, whose keys (key_of) are given in order.

        Examples that are alike stay together, on one side: a copy of what is trained says nothing about
        what is new. As many whole groups are taken as there is room for in the number that was asked for.

        Raises:
            InputError: nothing would be left to train, or nothing can be taken.
        """
        count = round(self.wanted * len(keys)) if self.wanted < 1 else int(self.wanted)
        count = max(1, count)
        alike: dict[bytes, list[int]] = {}
        for place, key in enumerate(keys):
            alike.setdefault(key, []).append(place)
        if count >= len(keys):
            raise InputError(
                f"--eval-split {self.wanted:g} leaves nothing to train: {source} has {len(keys):,} examples"
            )
        groups = list(alike.values())
        random.Random(self.seed).shuffle(groups)  # the same in every release of Python since 3.2
        taken: list[int] = []
        for group in groups:
            if len(taken) + len(group) <= count:
                taken += group
        if not taken:
            raise InputError(
                f"--eval-split {self.wanted:g}: the {len(keys):,} examples of {source} are alike in groups "
                "larger than that, and copies of an example are not parted"
            )
        return frozenset(taken)


def key_of(input_ids: Sequence[int]) -> bytes:
    """What tells an example apart: a digest of its token ids."""
    return hashlib.blake2b(array("q", input_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def row_keys(rows: Dataset) -> list[bytes]:
    """key_of of every row's `input_ids`, read from the table's own memory."""
    keys = []
    for chunk in rows.data.column("input_ids").chunks:
        values = chunk.values.to_numpy(zero_copy_only=True)
        offsets = chunk.offsets.to_pylist()
        for start, end in pairwise(offsets):
            content = values[start:end].tobytes()
            keys.append(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest())
    return keys


def trained_too(evaluated: Dataset, trained: Dataset) -> list[int]:
    """Places of the rows of `evaluated` whose token ids are a row of `trained` too."""
    known = set(row_keys(trained))
    return [place for place, key in enumerate(row_keys(evaluated)) if key in known]
