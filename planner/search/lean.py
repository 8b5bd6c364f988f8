"""The leanest setups of a search: if none of them fits, nothing that `plan` tries does.

One for each way of batching, of running layers and of multiplying with experts, at the smallest micro-batch,
with every layer's input alone kept, on the GPU or on the host. Limits (longest sequences, smallest cards,
whether a method fits at all) are asked of them, so that they are those of `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from planner.base.errors import NotModelledError
from planner.search.evaluator import Candidate, Evaluator
from planner.search.longest import longest_length
from planner.search.strategies import choices, layers_decided, sliced, start, ways
from planner.setup.training_setup import TrainingSetup

WORTH_A_REPLAY = 0.85
"""Share of the longest sequences known so far that a setup must reach by the fitted estimate to be replayed:
a bound that was chosen, not fitted; no pair of benchmarks/limits.py contradicts it."""

CLEARLY_FITS = 0.9
"""Share of what a card leaves up to which the upper end of the fitted estimate's interval says that a setup
fits: replayed, of 1,420 leanest setups (every model of the catalog at 512 tokens, all methods on one card,
QLoRA on two more) none needed more than 1.8% more."""

FURTHER = 512
"""Tokens beyond the longest sequences at which nothing fits either."""


def leanest(
    base: TrainingSetup, evaluator: Evaluator, *, effective_batch_size: int, fixed: Mapping[str, Any]
) -> Iterator[TrainingSetup]:
    """The setups, those whose memory is not modelled left out.

    Raises:
        InputError: the fixed knobs cannot give the effective batch.
    """
    plain = start(base, evaluator, fixed)
    for one in (plain, sliced(plain, evaluator, fixed)):
        if one is None:
            continue
        for _, setup, _ in ways(one, evaluator, fixed):
            for batch in choices(setup, evaluator, effective_batch_size, fixed)[:1]:
                yield from _kept(batch.of(setup), evaluator, fixed)


def _kept(setup: TrainingSetup, evaluator: Evaluator, fixed: Mapping[str, Any]) -> Iterator[TrainingSetup]:
    decided = layers_decided(fixed)
    found = [setup] if decided else [setup.replace(gradient_checkpointing=True)]
    if not decided and "activation_offloading" not in fixed:
        found.append(found[0].replace(activation_offloading=True))
    for one in found:
        try:
            evaluator.fitted(one)
        except NotModelledError:
            continue
        yield one


def smallest_that_fits(
    base: TrainingSetup, evaluator: Evaluator, *, effective_batch_size: int, fixed: Mapping[str, Any]
) -> Candidate | None:
    """The leanest setup that fits by the allocator's replay, as the replay has it; None where none does.

    Raises:
        InputError: the fixed knobs cannot give the effective batch.
    """
    found = leanest(base, evaluator, effective_batch_size=effective_batch_size, fixed=fixed)
    for setup in sorted(found, key=lambda one: evaluator.fitted(one).peak_upper_bytes):
        if evaluator.decide(setup):
            return evaluator.confirm(setup, whole=True)
    return None


def fits_at_all(
    base: TrainingSetup, evaluator: Evaluator, *, effective_batch_size: int, fixed: Mapping[str, Any]
) -> bool:
    """Whether anything fits, at the length of `base`: by the fitted estimate where that leaves no doubt, else
    by the allocator's replay.

    Raises:
        InputError: the fixed knobs cannot give the effective batch.
    """
    setups = list(leanest(base, evaluator, effective_batch_size=effective_batch_size, fixed=fixed))
    clear = CLEARLY_FITS * evaluator.usable_bytes
    if any(evaluator.fitted(one).peak_upper_bytes <= clear for one in setups):
        return True
    return any(evaluator.decide(one) for one in setups)


def longest_that_fits(
    base: TrainingSetup,
    evaluator: Evaluator,
    *,
    effective_batch_size: int,
    fixed: Mapping[str, Any],
    start_length: int,
    limit: int | None = None,
) -> int | None:
    """The longest sequences, in steps of 64 up to `limit` (None: the model's window), that anything the
    search tries fits at; None where nothing fits at `start_length`.

    Raises:
        InputError: the fixed knobs cannot give the effective batch.
    """
    limit = evaluator.model.max_position_embeddings if limit is None else limit
    shortest = base.replace(max_length=min(start_length, limit))
    setups = list(leanest(shortest, evaluator, effective_batch_size=effective_batch_size, fixed=fixed))
    by_fit = partial(longest_length, evaluator, start=start_length, limit=limit)
    guesses = [(by_fit(one) or 0, index) for index, one in enumerate(setups)]

    def order(guess: tuple[int, int]) -> tuple[int, int, int]:
        """The longest first; of those at the model's limit the one that `smallest_that_fits` begins with."""
        length, index = guess
        peak = 0
        if length == limit:
            peak = evaluator.fitted(setups[index].replace(max_length=limit)).peak_upper_bytes
        return -length, peak, -index

    guesses.sort(key=order)
    best: int | None = None
    for guess, index in guesses:
        if best is not None and (best == limit or guess < WORTH_A_REPLAY * best):
            continue
        found = longest_length(
            evaluator, setups[index], start=best or start_length, limit=limit, confirm=True
        )
        best = found if best is None else max(best, found or 0)
    # Memory does not rise with every step: blocks may fit better at a longer one.
    while best is not None and best + FURTHER <= limit:
        worth = [setups[index] for guess, index in guesses if guess >= WORTH_A_REPLAY * best]
        further = [one.replace(max_length=best + FURTHER) for one in worth or setups]
        longer = next((one for one in further if evaluator.decide(one)), None)
        if longer is None:
            break
        best = longest_length(evaluator, longer, start=longer.max_length, limit=limit, confirm=True)
    return best
