"""Rivals of a plan's choice: setups spread over all ways to execute a step, the fastest of each way first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.measured import MEASURED_ON
from launcher.measuring.measured_run import STEADY_SECONDS, WARM_UP_STEPS, most_steps
from launcher.measuring.profile import Profile
from planner.gpus.catalog import gpu_catalog
from planner.gpus.target import GpuTarget
from planner.models.catalog import load_shipped
from planner.search.evaluator import Candidate, Evaluator
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import estimate_step

RIVALS = (("compiled", 5), ("eager", 9), ("liger", 6))
"""Wanted rivals that are predicted to fit; compiled ones cost some ten seconds of compilation each."""
DOUBTFUL = "(may not fit)"
DOUBTFUL_RIVALS = 1
OTHER_OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit")
LARGEST_EAGER_BATCH = 4
"""Eager steps are no faster with larger ones from there on, and cost more to measure."""
BUDGETS = (0.1, 0.3, 0.5)
CONTENDER_SHARE = 0.75
"""Rivals forecast slower than this share of the choice run fewer steps: noise cannot make them win."""

# Device seconds of a profile, from the timestamps of profiles/runs/capped-h100-80gb.jsonl and compiled-*.
BUILD_SECONDS_PER_PARAMETER = 0.2e-9
TRAINER_SECONDS = 0.5
FIRST_STEP_SECONDS = {"none": 0.3, "liger": 2.0}
COMPILED_RUN_SECONDS = 4.0
GRAPH_SECONDS = {False: 5.0, True: 1.0}
"""A graph that is new, and one that an earlier run left in the compiler's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """A setup to measure; `sure` if its memory's upper end fits, `contender` if it may be the fastest."""

    setup: TrainingSetup
    sure: bool
    contender: bool


def rivals(chosen: TrainingSetup, target: GpuTarget) -> list[Rival]:
    """Distinct setups beside the choice: those predicted to fit, then the fastest of those that may not."""
    evaluator = Evaluator(load_shipped(chosen.model), target.spec, target.usable_bytes)
    known: dict[TrainingSetup, tuple[Way, Candidate]] = {}
    for way, setup in _space(chosen, evaluator):
        candidate = evaluator.try_evaluate(setup)
        if setup != chosen and candidate is not None and evaluator.may_fit(candidate):
            known.setdefault(setup, (way, candidate))
    picked = _spread([one for one in known.values() if evaluator.fits(one[1])])
    doubtful = [one for _, one in known.values() if not evaluator.fits(one)]
    doubtful.sort(key=lambda one: -_rate(one))
    best = _rate(evaluator.evaluate(chosen))
    return [
        Rival(setup=one.setup, sure=sure, contender=_rate(one) >= CONTENDER_SHARE * best)
        for sure, group in ((True, picked), (False, doubtful[:DOUBTFUL_RIVALS]))
        for one in group
    ]


def profile_of(rival: Rival, memory_cap_bytes: int) -> Profile:
    """The run that measures a rival: at least two sequences a step, more steps for contenders."""
    size = rival.setup.per_device_train_batch_size
    accumulation = max(1, 2 // size) if rival.contender else 1
    return Profile(
        setup=rival.setup.replace(gradient_accumulation_steps=accumulation),
        steps=2 if rival.contender else 1,
        memory_cap_bytes=memory_cap_bytes,
    )


Way = tuple[str, str]
"""An execution and what is checkpointed."""


def _space(chosen: TrainingSetup, evaluator: Evaluator) -> Iterator[tuple[Way, TrainingSetup]]:
    """All setups that are considered, with the way each executes a step."""
    share = chosen.effective_batch_size
    plain = chosen.replace(
        gradient_checkpointing=True,
        checkpointed_layers=None,
        selective_checkpointing=False,
        activation_offloading=False,
        activation_memory_budget=None,
        compile="none",
        kernels="none",
    )
    executions = [("eager", plain), ("liger", plain.replace(kernels="liger"))]
    if evaluator.compiles:
        executions.append(("compiled", plain.replace(compile="regional")))
    for size in (size for size in range(1, share + 1) if share % size == 0):
        for name, base in executions:
            if name != "compiled" and size > LARGEST_EAGER_BATCH:
                continue
            setup = base.replace(per_device_train_batch_size=size, gradient_accumulation_steps=share // size)
            for level, one in _levels(setup, evaluator):
                yield (name, level), one
                if level == "all":
                    for optim in OTHER_OPTIMIZERS:
                        yield (name, "other optimizer"), one.replace(optim=optim)
    # The choice itself, varied one knob at a time.
    own = "compiled" if chosen.compile != "none" else "liger" if chosen.kernels == "liger" else "eager"
    layers = chosen.checkpointed_layers
    if layers is not None and chosen.gradient_checkpointing:
        for other in (layers - 2, layers - 1, layers + 2, layers + 4):
            if 0 < other < evaluator.model.num_hidden_layers:
                yield (own, "near the choice"), chosen.replace(checkpointed_layers=other)
    for optim in OTHER_OPTIMIZERS:
        if optim != chosen.optim:
            yield (own, "near the choice"), chosen.replace(optim=optim)


def _levels(setup: TrainingSetup, evaluator: Evaluator) -> Iterator[tuple[str, TrainingSetup]]:
    yield "all", setup
    yield "offloaded", setup.replace(activation_offloading=True)
    yield "selective", setup.replace(selective_checkpointing=True)
    bare = setup.replace(gradient_checkpointing=False)
    yield "none", bare
    if setup.compile != "none" and setup.lora_dropout == 0:
        for budget in BUDGETS:
            yield "budget", bare.replace(activation_memory_budget=budget)
    fits = [
        layers
        for layers in range(1, evaluator.model.num_hidden_layers)
        if (one := evaluator.try_evaluate(setup.replace(checkpointed_layers=layers))) is not None
        and evaluator.fits(one)
    ]
    for layers in dict.fromkeys(fits[:1] + fits[2:3] + [layer - 2 for layer in fits[:1] if layer > 2]):
        yield "some", setup.replace(checkpointed_layers=layers)


def _rate(candidate: Candidate) -> float:
    return candidate.tokens_per_second or 0.0


def _spread(fitting: Sequence[tuple[Way, Candidate]]) -> list[Candidate]:
    """So many of each execution, its levels in turn; what one execution lacks the others make up for."""
    picked: list[Candidate] = []
    lacking = 0
    for execution, count in RIVALS:
        queue = _in_turn([one for one in fitting if one[0][0] == execution])
        picked += queue[: count + (lacking if execution != "compiled" else 0)]
        lacking = sum(wanted for _, wanted in RIVALS[: RIVALS.index((execution, count)) + 1]) - len(picked)
    rest = [one for _, one in fitting if one not in picked and one.setup.compile == "none"]
    picked += sorted(rest, key=lambda one: -_rate(one))[:lacking]
    return sorted(picked, key=_order)


def _in_turn(ways: Sequence[tuple[Way, Candidate]]) -> list[Candidate]:
    """The fastest of each level, the fastest level first; then the levels' fastest at other micro-batches."""
    levels: dict[str, list[Candidate]] = {}
    for (_, level), candidate in sorted(ways, key=lambda one: -_rate(one[1])):
        levels.setdefault(level, []).append(candidate)
    ranked: list[tuple[int, float, Candidate]] = []
    for queue in levels.values():
        seen: list[int] = []
        for candidate in queue:
            size = candidate.setup.per_device_train_batch_size
            # A level's first is its fastest; then the small micro-batches, which cost least; then the rest.
            turn = 0 if not seen else size if size not in seen else 100 * seen.count(size)
            seen.append(size)
            ranked.append((turn, -_rate(candidate), candidate))
    return [one for *_, one in sorted(ranked, key=lambda one: one[:2])]


def _order(candidate: Candidate) -> tuple[bool, bool, int, str]:
    """Compiled ones together, by micro-batch: neighbours share compiled graphs."""
    setup = candidate.setup
    return (
        setup.kernels != "none",
        setup.compile != "none",
        setup.per_device_train_batch_size,
        setup.optim,
    )


def device_seconds(profiles: Sequence[Profile]) -> float:
    """What measuring profiles of one model takes, without process starts."""
    total, compiled = 0.0, set[tuple[object, ...]]()
    for profile in profiles:
        total += _run_seconds(profile)
        graphs = _graphs(profile.setup)
        total += COMPILED_RUN_SECONDS if graphs else 0.0
        total += sum(GRAPH_SECONDS[graph in compiled] for graph in graphs)
        compiled.update(graphs)
    return total


def _run_seconds(profile: Profile) -> float:
    """Building and all steps, compilation apart."""
    setup = profile.setup
    model = load_shipped(setup.model)
    seconds = TRAINER_SECONDS + BUILD_SECONDS_PER_PARAMETER * model.parameter_count
    seconds += FIRST_STEP_SECONDS[setup.kernels]
    step = estimate_step(TrainingRun(setup=setup, model=model), gpu_catalog().get(MEASURED_ON))
    one = step.seconds_per_optimizer_step
    steady = min(max(profile.steps, math.ceil(STEADY_SECONDS / one)), most_steps(profile))
    return seconds + (WARM_UP_STEPS + steady) * one


def _graphs(setup: TrainingSetup) -> tuple[tuple[object, ...], ...]:
    """Which compiled graphs a setup runs."""
    if setup.compile == "none":
        return ()
    shape = (setup.model, setup.per_device_train_batch_size, setup.max_length, setup.kernels)
    kept = (*shape, "selective" if setup.selective_checkpointing else "checkpointed")
    free = (*shape, setup.activation_memory_budget)
    if not setup.gradient_checkpointing:
        return (free,)
    return (kept,) if setup.checkpointed_layers is None else (kept, free)
