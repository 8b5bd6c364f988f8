"""Token rows for measured runs: full sequences, mixed ones, or the example lengths of real data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.measuring.profile import Profile


def random_rows(profile: Profile, steps: int, vocab_size: int) -> list[list[int]]:
    """Random token ids: one row for each of the profile's lengths, in order, where it has any.

    Without lengths there are as many full sequences as the steps need; every other one half as long when
    batches are to be padded; when packed, three to a sequence that fill it.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = profile.lengths or _full_lengths(profile, steps)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _full_lengths(profile: Profile, steps: int) -> list[int]:
    setup = profile.setup
    count = setup.effective_batch_size * steps
    length, half, quarter = setup.max_length, setup.max_length // 2, setup.max_length // 4
    if setup.packing:
        return [half, quarter, length - half - quarter] * count
    return [max(2, half) if profile.padded and index % 2 else length for index in range(count)]


def token_dataset(rows: Sequence[list[int]]) -> Any:
    """The rows as a dataset that is tokenised already, every token in the loss."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": list(rows), "labels": list(rows)})


@dataclass(slots=True)
class TokenCounter:
    """A data collator around the trainer's own that notes the tokens of each batch, in their order.

    `useful` are the examples' own tokens, `processed` those and the padding. Batches are made before they
    are used, so the last ones may never have been.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    useful: list[int] = field(default_factory=list)
    processed: list[int] = field(default_factory=list)

    def __call__(self, examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        """Make a batch."""
        batch = self.collator(examples)
        self.useful.append(sum(len(example["input_ids"]) for example in examples))
        self.processed.append(batch["input_ids"].numel())
        return batch
