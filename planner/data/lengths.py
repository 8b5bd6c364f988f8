"""DatasetStats: the token lengths of a dataset's examples, and what truncation, padding and packing cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass

SCHEMA_VERSION = 3
LOSS_KINDS = ("all", "completion", "assistant")
MAX_TOKENS = 2**40


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """What cutting examples at a length loses: examples that are cut and tokens that are dropped."""

    examples: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """Tokens an epoch pushes through the model when examples are padded to the longest of their batch.

    `real_tokens` are the examples' own, `processed_tokens` real and padding together (an expectation over
    random batches), `expected_longest` the mean length of a batch's longest example.
    """

    real_tokens: int
    processed_tokens: int
    expected_longest: float

    @property
    def waste(self) -> float:
        """Share of processed tokens that are padding, 0 to 1."""
        return 1.0 - self.real_tokens / self.processed_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """What packing whole examples into sequences of a fixed length gives."""

    sequences: int
    real_tokens: int
    sequence_length: int

    @property
    def fill(self) -> float:
        """Share of the sequences' positions that hold tokens, 0 to 1."""
        return self.real_tokens / (self.sequences * self.sequence_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetStats:
    """Token lengths of a dataset, as (length, number of examples) pairs with rising length.

    `loss_tokens` is how many tokens the loss sees in an epoch without truncation, `loss_on` which those are:
    "all" tokens, the "completion", or the "assistant" turns. `estimated` says that lengths were estimated
    from the text's size and not measured with a tokenizer.

    `starts` are (tokens before the first trained one, number of examples) pairs, rising, of the examples that
    do not begin with a trained token: cut at a length, an example whose prompt fills it has nothing to learn
    and is not trained. `untrained` examples have no trained token at any length and are not among `lengths`.
    `left_out` are the keys of rows that nothing is made of, `notes` what else of the examples is not trained,
    in words. Examples have `images` in all, of which the model's processor makes `total_patches`, and
    `image_patches` of those of one example at most (0: they were counted for no model).
    """

    lengths: tuple[tuple[int, int], ...]
    loss_tokens: int
    loss_on: str
    data_format: str
    estimated: bool
    starts: tuple[tuple[int, int], ...] = ()
    untrained: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    images: int = 0
    image_patches: int = 0
    total_patches: int = 0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise InputError("a dataset without examples has no statistics")
        previous = 0
        for length, count in self.lengths:
            validate.integer("length", length, minimum=previous + 1, maximum=MAX_TOKENS)
            validate.integer("count", count, minimum=1, maximum=MAX_TOKENS)
            previous = length
        validate.integer("loss_tokens", self.loss_tokens, minimum=0, maximum=self.total_tokens)
        validate.choice("loss_on", self.loss_on, LOSS_KINDS)
        validate.text("data_format", self.data_format)
        validate.boolean("estimated", self.estimated)
        previous = 0
        for start, count in self.starts:
            validate.integer("start", start, minimum=previous + 1, maximum=self.longest)
            validate.integer("count", count, minimum=1, maximum=self.examples)
            previous = start
        validate.integer("untrained", self.untrained, minimum=0, maximum=MAX_TOKENS)
        for name in ("images", "image_patches", "total_patches"):
            validate.integer(name, getattr(self, name), minimum=0, maximum=MAX_TOKENS)
        for name, texts in (("left_out", self.left_out), ("note", self.notes)):
            for text in texts:
                validate.text(name, text)

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int],
        *,
        loss_tokens: int,
        loss_on: str,
        data_format: str,
        estimated: bool,
        starts: Iterable[int] = (),
        untrained: int = 0,
        left_out: Iterable[str] = (),
        notes: tuple[str, ...] = (),
        images: int = 0,
        image_patches: int = 0,
        total_patches: int = 0,
    ) -> DatasetStats:
        """Count one length, and one start where there are any, per example.

        Raises:
            InputError: no example, or a length below 1.
        """
        counted = tuple(sorted(Counter(lengths).items()))
        return cls(
            lengths=counted,
            loss_tokens=loss_tokens,
            loss_on=loss_on,
            data_format=data_format,
            estimated=estimated,
            starts=tuple(sorted(Counter(start for start in starts if start).items())),
            untrained=untrained,
            left_out=tuple(left_out),
            notes=notes,
            images=images,
            image_patches=image_patches,
            total_patches=total_patches,
        )

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(count for _, count in self.lengths)

    @property
    def total_tokens(self) -> int:
        """Tokens of all examples, nothing truncated."""
        return sum(length * count for length, count in self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self.lengths[-1][0]

    @property
    def mean(self) -> float:
        """Mean tokens per example."""
        return self.total_tokens / self.examples

    def percentile(self, percent: float) -> int:
        """Smallest length that at least `percent` of the examples do not exceed (nearest rank)."""
        validate.number("percent", percent, minimum=0.0, maximum=100.0)
        rank = max(1, math.ceil(self.examples * percent / 100.0))
        seen = 0
        for length, count in self.lengths:
            seen += count
            if seen >= rank:
                return length
        return self.longest

    def truncation(self, max_length: int) -> Truncation:
        """What TRL's `max_length` drops, examples without a trained token below it whole."""
        _check_length(max_length)
        cut = [(length, count) for length, count in self.lengths if length > max_length]
        return Truncation(
            examples=sum(count for _, count in cut),
            tokens=sum((length - max_length) * count for length, count in cut)
            + max_length * self.masked(max_length),
        )

    def masked(self, max_length: int) -> int:
        """Examples whose trained tokens all lie beyond `max_length`: they are not trained."""
        return sum(count for start, count in self.starts if start >= max_length)

    def not_trained(self, max_length: int) -> tuple[str, ...]:
        """The line that says how many examples are not trained at a length; none where all are.

        Raises:
            InputError: no example is.
        """
        masked, every = self.masked(max_length), self.examples + self.untrained
        if masked + self.untrained == every:
            raise InputError(
                f"max_length={max_length}: none of the {every:,} examples has a token to learn within it"
            )
        reasons = []
        if masked:
            reasons.append(f"the prompt of {masked:,} fills max_length {max_length:,}")
        if self.untrained:
            reasons.append(f"{self.untrained:,} have none")
        told = f"{masked + self.untrained:,} of {every:,} examples are not trained, having no token to learn"
        return (f"{told}: {' and '.join(reasons)}",) if reasons else ()

    def padding(self, batch_size: int, max_length: int) -> Padding:
        """What padding to the longest of each random batch of `batch_size` costs over an epoch."""
        validate.integer("batch_size", batch_size, minimum=1, maximum=2**31)
        _check_length(max_length)
        kept = self.clipped(max_length)
        examples = sum(count for _, count in kept)
        size = min(batch_size, examples)
        expected, below, seen = 0.0, 0.0, 0
        for length, count in kept:
            seen += count
            at_most = (seen / examples) ** size
            expected += length * (at_most - below)
            below = at_most
        real = self.total_tokens - self.truncation(max_length).tokens
        return Padding(
            real_tokens=real,
            processed_tokens=max(real, round(expected * examples)),
            expected_longest=expected,
        )

    def packing(self, max_length: int) -> Packing:
        """Sequences that TRL's best-fit-decreasing packing makes (`packing_strategy="bfd"`), exactly.

        Source: trl/data_utils.py, `_pack_bfd`: longest example first, each into the sequence with the least
        space that still holds it. Examples of equal length are placed together here.
        """
        _check_length(max_length)
        open_sequences: dict[int, int] = {}
        spaces: list[int] = []
        sequences = 0
        for length, count in reversed(self.clipped(max_length)):
            left = count
            while left:
                index = bisect_left(spaces, length)
                space = spaces[index] if index < len(spaces) else max_length
                fits = space // length
                if index < len(spaces):
                    available = open_sequences[space]
                    used = min(available, -(-left // fits))
                    open_sequences[space] -= used
                    if not open_sequences[space]:
                        del open_sequences[space]
                        spaces.pop(index)
                else:
                    used = -(-left // fits)
                    sequences += used
                placed = min(left, used * fits)
                in_last = placed - (used - 1) * fits
                _return_space(open_sequences, spaces, space - fits * length, used - 1)
                _return_space(open_sequences, spaces, space - in_last * length, 1)
                left -= placed
        real = self.total_tokens - self.truncation(max_length).tokens
        return Packing(sequences=sequences, real_tokens=real, sequence_length=max_length)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; what is said of images is left out where there are none."""
        values = {**asdict(self), "schema_version": SCHEMA_VERSION}
        if not self.images:
            for name in ("images", "image_patches", "total_patches"):
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetStats:
        """Read the JSON form.

        Raises:
            InputError: the JSON does not describe dataset statistics.
        """
        rest = dict(values)
        version = rest.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise FieldError("schema_version", version, str(SCHEMA_VERSION))
        try:
            for name in ("lengths", "starts"):
                rest[name] = tuple((length, count) for length, count in rest[name])
            for name in ("left_out", "notes"):
                rest[name] = tuple(rest[name])
            return cls(**rest)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"not dataset statistics: {error}") from error

    def clipped(self, max_length: int) -> list[tuple[int, int]]:
        """The pairs of what is trained after truncation, those at the limit merged.

        Where nothing is, which not_trained refuses, one example at the limit stands for it.
        """
        kept = [(length, count) for length, count in self.lengths if length < max_length]
        cut = sum(count for length, count in self.lengths if length >= max_length)
        # All that is masked is longer than the limit: its first trained token lies beyond.
        cut = cut - self.masked(max_length) if kept else max(1, cut - self.masked(max_length))
        return [*kept, (max_length, cut)] if cut else kept


def _check_length(max_length: int) -> None:
    validate.integer("max_length", max_length, minimum=1, maximum=2**31)


def _return_space(open_sequences: dict[int, int], spaces: list[int], space: int, count: int) -> None:
    if space <= 0 or count <= 0:
        return
    if space not in open_sequences:
        open_sequences[space] = 0
        spaces.insert(bisect_left(spaces, space), space)
    open_sequences[space] += count
