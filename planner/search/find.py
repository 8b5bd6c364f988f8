"""search: try what may be fast, and choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from planner.search.choice import SPEED_TIE, SearchResult, Tried, fastest, finish_seconds, replayed
from planner.search.evaluator import Evaluator
from planner.search.lean import leanest
from planner.search.levels import goes_on, levels, spend, tried
from planner.search.strategies import SLICED_EXPERTS, choices, layers_decided, sliced, start, ways
from planner.setup.defaults import FASTER_OPTIM, OPTIM
from planner.setup.training_setup import TrainingSetup

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
    look = partial(
        _search,
        evaluator=evaluator,
        effective_batch_size=effective_batch_size,
        fixed=fixed,
        confirm=confirm,
        tokens=tokens,
        thorough=thorough,
    )
    result = look(base, "")
    lean = sliced(base, evaluator, fixed) if result.chosen is None else None
    if lean is None:
        return result
    leaner = look(lean, SLICED_EXPERTS)
    return SearchResult(tried=(*result.tried, *leaner.tried), chosen=leaner.chosen)


def _search(
    base: TrainingSetup,
    name: str,
    *,
    evaluator: Evaluator,
    effective_batch_size: int,
    fixed: Mapping[str, Any],
    confirm: bool,
    tokens: int,
    thorough: bool,
) -> SearchResult:
    """The search from where one starts; `name` begins its strategies."""
    found: list[Tried] = []
    decided = layers_decided(fixed)
    keep = partial(
        levels,
        evaluator=evaluator,
        confirm=confirm,
        thorough=thorough,
        offload="activation_offloading" not in fixed,
    )
    for way, setup, as_asked in ways(base, evaluator, fixed):
        prefix = name + way
        if not as_asked and evaluator.try_evaluate(setup) is None:
            continue
        for batch in choices(setup, evaluator, effective_batch_size, fixed):
            there = batch.of(setup)
            level = [tried(there, prefix + ALL_AS_GIVEN, evaluator)] if decided else list(keep(there, prefix))
            found += level
            # Memory rises with the micro-batch.
            if not any(goes_on(one, evaluator, confirm=confirm) for one in level):
                break
    if confirm:
        least = partial(leanest, base, evaluator, effective_batch_size=effective_batch_size, fixed=fixed)
        chosen = _confirm(found, evaluator, tokens, least)
    else:
        chosen = fastest([one for one in found if one.fits], tokens)
    if chosen is not None and "optim" not in fixed:
        faster = _with_faster_optimizer(chosen, evaluator, tokens, confirm=confirm)
        if faster is not None:
            found.append(faster)
            chosen = faster
    return SearchResult(tried=tuple(found), chosen=chosen)


def _with_faster_optimizer(
    chosen: Tried, evaluator: Evaluator, tokens: int, *, confirm: bool
) -> Tried | None:
    """The chosen setup with the optimizer that is done sooner, where that is more than a tie and fits.

    Only for the one that is taken where none was asked for: another one is a person's choice.
    """
    setup = chosen.candidate.setup
    if not setup.uses_lora or setup.optim != OPTIM:
        return None
    faster = tried(setup.replace(optim=FASTER_OPTIM), f"{chosen.strategy}, {FASTER_OPTIM}", evaluator)
    sooner, now = (finish_seconds(one.candidate, tokens) for one in (faster, chosen))
    if sooner is None or now is None or sooner * (1 + SPEED_TIE) >= now:
        return None
    if confirm:
        faster = replayed(faster, evaluator)
    return faster if faster.fits else None


def _confirm(
    found: list[Tried], evaluator: Evaluator, tokens: int, least: Callable[[], Iterable[TrainingSetup]]
) -> Tried | None:
    """Replay the contenders, the fastest first, until one fits; what was replayed shows its replay.

    Adds to what was found a setup that spends what the first that fits leaves. The leanest setups, `least`,
    are replayed before it is said that nothing fits.
    """
    contenders = [one for one in found if evaluator.may_fit(one.candidate)]
    replays = 0
    while (best := fastest(contenders, tokens)) is not None:
        shown = replayed(best, evaluator)
        found[found.index(best)] = shown
        if shown.fits:
            spent = spend(shown, evaluator)
            if spent is not shown:
                found.append(spent)
            return spent
        contenders.remove(best)
        replays += 1
        if replays == MAX_DOUBTFUL_REPLAYS:
            last = set(least())
            contenders = [one for one in contenders if one.fits or one.candidate.setup in last]
    return None
