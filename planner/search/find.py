"""search: try what may be fast, and choose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from planner.candidate import Evaluator
from planner.search.choice import SearchResult, Tried, fastest, replayed
from planner.search.levels import goes_on, levels, spend, tried
from planner.search.strategies import (
    AS_GIVEN,
    EAGER,
    LAYERS_KEEP,
    batchings,
    choices,
    modes,
    start,
)
from planner.training_setup import TrainingSetup

TOKENS = 10_000_000
"""Tokens that a run is taken to have where its data is not known: a few thousand examples, some epochs."""
MAX_DOUBTFUL_REPLAYS = 8
"""Replays after which only what fits by the fitted estimate's wide interval is still considered."""
ALL_AS_GIVEN = "as given"


def search(
    base: TrainingSetup,
    evaluator: Evaluator,
    *,
    effective_batch_size: int,
    fixed: Mapping[str, Any],
    confirm: bool = False,
    tokens: int = TOKENS,
    thorough: bool = True,
) -> SearchResult:
    """Find the setup that is first done with so many tokens, at the length and with the knobs of `base`.

    `effective_batch_size` counts examples. Where the evaluator knows the data, `tokens` are the examples' own
    and batches are chosen too. With `confirm` a setup fits by the allocator's replay, which is in its
    figures; else by the fitted estimate. Not `thorough`, fewer of what layers may keep is tried.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
        InputError: the fixed knobs cannot give the effective batch.
    """
    base = start(base, evaluator, fixed)
    found: list[Tried] = []
    decided = any(name in fixed for name in LAYERS_KEEP)
    keep = partial(
        levels,
        evaluator=evaluator,
        confirm=confirm,
        thorough=thorough,
        offload="activation_offloading" not in fixed,
    )
    for batching in batchings(base, evaluator, fixed):
        batched = base.replace(**dict(batching.knobs))
        asked_for = batching is AS_GIVEN or base.packing
        for mode in modes(batched, evaluator, fixed):
            setup = batched.replace(**dict(mode.knobs))
            if not (asked_for and mode is EAGER) and evaluator.try_evaluate(setup) is None:
                continue
            prefix = batching.name + mode.name
            for batch in choices(setup, evaluator, effective_batch_size, fixed):
                there = batch.of(setup)
                level = (
                    [tried(there, prefix + ALL_AS_GIVEN, evaluator)] if decided else list(keep(there, prefix))
                )
                found += level
                # Memory rises with the micro-batch.
                if not any(goes_on(one, evaluator, confirm=confirm) for one in level):
                    break
    if confirm:
        return _confirm(found, evaluator, tokens)
    return SearchResult(tried=tuple(found), chosen=fastest([one for one in found if one.fits], tokens))


def _confirm(found: list[Tried], evaluator: Evaluator, tokens: int) -> SearchResult:
    """Replay the contenders, the fastest first, until one fits; what was replayed shows its replay."""
    contenders = [one for one in found if evaluator.may_fit(one.candidate)]
    replays = 0
    while (best := fastest(contenders, tokens)) is not None:
        shown = replayed(best, evaluator)
        found[found.index(best)] = shown
        if shown.fits:
            spent = spend(shown, evaluator)
            if spent is not shown:
                found.append(spent)
            return SearchResult(tried=tuple(found), chosen=spent)
        contenders.remove(best)
        replays += 1
        if replays == MAX_DOUBTFUL_REPLAYS:
            contenders = [one for one in contenders if one.fits]
    return SearchResult(tried=tuple(found), chosen=None)
