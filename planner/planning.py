"""make_plan: PlanRequest -> Plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner import policy
from planner.advice import make_it_fit, use_what_is_left
from planner.candidate import Candidate, Evaluator
from planner.cards import smallest_card
from planner.dataset_stats import DatasetStats
from planner.errors import NotModelledError
from planner.frontier import frontier
from planner.gpu_target import GpuTarget, resolve_gpu
from planner.loading import load_needs, model_notes
from planner.memory.adapter import trainables
from planner.model_catalog import Inspector, resolve_model
from planner.model_spec import ModelSpec
from planner.other_cards import Question, other_cards
from planner.plan import Alternative, DataSummary, Duration, MethodFigures, Plan, PlannedModel, Schedule
from planner.request import DEFAULT_EFFECTIVE_BATCH_SIZE, DEFAULT_RANK, PlanRequest
from planner.search import TOKENS, SearchResult, Tried, search
from planner.throughput import compile_seconds
from planner.throughput.flops import attention_implementation
from planner.training_setup import METHODS, TrainingSetup

TOKENS_WITHOUT_DATA = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """What the search over lengths came to."""

    tried: Tried
    result: SearchResult
    fits: bool
    effective_batch_size: int


def make_plan(
    request: PlanRequest,
    *,
    stats: DatasetStats | None = None,
    allow_network: bool = False,
    inspector: Inspector | None = None,
    target: GpuTarget | None = None,
) -> Plan:
    """Choose the fastest setup that fits and say what it needs.

    `stats` are the lengths of the request's data where they have been measured with the model's tokenizer;
    without them they are estimated from the size of the texts.
    `inspector` describes models that equal none of the catalog (it needs the training stack); with
    `allow_network` the config of a Hub id may be fetched. `target` stands in for the request's GPU: a card of
    which less is to be used than it has.

    Raises:
        InputError: model, GPU, data or knobs are not usable.
        MissingExtraError: the model's architecture needs the training stack, which is not installed.
    """
    target = resolve_gpu(request.gpu, display=request.display) if target is None else target
    model = resolve_model(request.model, allow_network=allow_network, inspector=inspector)
    if stats is None and request.data is not None:
        stats = read_stats(request.data)
    longest = None if stats is None or stats.estimated else stats.longest
    evaluator = Evaluator(model, target.spec, target.usable_bytes, padded=stats is not None, longest=longest)
    chosen = _choose(request, target, model, stats, evaluator, _processes(request, target, evaluator))
    best = chosen.tried.candidate
    setup = best.setup
    schedule = _schedule(request, setup, model, chosen.effective_batch_size)
    data = None if stats is None else summarise_data(str(request.data), stats, setup)
    lengths = policy_lengths(request, model, stats)
    card = None if chosen.fits else smallest_card(evaluator, setup, lengths)
    duration = _duration(best, schedule, data, target, request.price_usd_per_hour)
    question = Question(
        tried=chosen.result.tried,
        chosen=best,
        fits=chosen.fits,
        lengths=lengths,
        open_ended=stats is None and "max_length" not in request.fixed,
        fixed=frozenset(request.fixed),
        duration=duration,
        smallest=card,
    )
    return Plan(
        request=request,
        gpu=target,
        model=_planned_model(model, setup),
        fits=chosen.fits,
        setup=setup,
        strategy=chosen.tried.strategy,
        schedule=schedule,
        memory=best.memory,
        speed=best.speed,
        duration=duration,
        loading=load_needs(model, best.memory),
        data=data,
        methods=_methods(evaluator, best, fits=chosen.fits),
        alternatives=_alternatives(chosen, evaluator),
        advice=(
            use_what_is_left(evaluator, setup, request)
            if chosen.fits
            else make_it_fit(evaluator, setup, target)
        ),
        smallest_gpu=card,
        assumptions=_assumptions(request, target, setup, schedule, stats),
        notes=model_notes(model, setup, best.memory, target.usable_bytes),
        frontier=frontier(chosen.result.tried, chosen.tried, evaluator),
        other_cards=other_cards(question, evaluator),
    )


def read_stats(path: str) -> DatasetStats:
    """Lengths of a data file, estimated from the size of its texts.

    Raises:
        InputError: the file cannot be read or is not training data.
    """
    from pathlib import Path

    from planner.dataset_reader import estimate_stats, read_training_data

    return estimate_stats(read_training_data(Path(path)))


def policy_lengths(request: PlanRequest, model: ModelSpec, stats: DatasetStats | None) -> tuple[int, ...]:
    """Lengths to try for a request, the wished one first."""
    return policy.lengths(model, request.fixed.get("max_length"), stats)


def effective_batch_size(request: PlanRequest, num_processes: int) -> int:
    """The effective batch asked for; else what fixed knobs give; else 16 or the nearest they allow."""
    if request.effective_batch_size is not None:
        return request.effective_batch_size
    micro = request.fixed.get("per_device_train_batch_size")
    accumulation = request.fixed.get("gradient_accumulation_steps")
    unit = num_processes
    for value in (micro, accumulation):
        unit *= value if isinstance(value, int) else 1
    if isinstance(micro, int) and isinstance(accumulation, int):
        return unit
    return max(1, round(DEFAULT_EFFECTIVE_BATCH_SIZE / unit)) * unit


def _choose(
    request: PlanRequest,
    target: GpuTarget,
    model: ModelSpec,
    stats: DatasetStats | None,
    evaluator: Evaluator,
    processes: int,
) -> _Chosen:
    fixed = request.fixed
    chosen: dict[str, Any] = {"dtype": target.spec.dtype, "num_processes": processes}
    result = None
    for length in policy_lengths(request, model, stats):
        base = request.setup(**chosen, max_length=length)
        effective = effective_batch_size(request, base.num_processes)
        result = search(
            base,
            evaluator,
            effective_batch_size=effective,
            fixed=fixed,
            confirm=True,
            tokens=TOKENS if stats is None else round(stats.total_tokens * _epochs(request)),
        )
        if result.chosen is not None:
            return _Chosen(tried=result.chosen, result=result, fits=True, effective_batch_size=effective)
    assert result is not None
    smallest = _smallest(result, evaluator)
    return _Chosen(
        tried=smallest,
        result=result,
        fits=smallest.fits,
        effective_batch_size=effective,
    )


def _smallest(result: SearchResult, evaluator: Evaluator) -> Tried:
    """What needs least by the allocator's replay: the smallest of eager and of compiled layers."""
    found = []
    for kind in sorted({one.candidate.setup.compile for one in result.tried}):
        tried = tuple(one for one in result.tried if one.candidate.setup.compile == kind)
        one = SearchResult(tried=tried, chosen=None).smallest
        candidate = evaluator.confirm(one.candidate.setup, whole=True)
        found.append(Tried(strategy=one.strategy, candidate=candidate, fits=evaluator.fits(candidate)))
    return min(found, key=lambda one: one.candidate.peak_upper_bytes)


def _epochs(request: PlanRequest) -> float:
    return policy.EPOCHS if request.num_train_epochs is None else float(request.num_train_epochs)


def _processes(request: PlanRequest, target: GpuTarget, evaluator: Evaluator) -> int:
    """GPUs that the run uses: as fixed, else all; one where the memory of several is not modelled."""
    fixed = request.fixed.get("num_processes")
    if isinstance(fixed, int):
        return fixed
    if target.count == 1:
        return 1
    try:
        evaluator.evaluate(request.setup(max_length=policy.DEFAULT_LENGTHS[-1], num_processes=target.count))
    except NotModelledError as error:
        if error.field in ("num_processes", "distributed") and "distributed" not in request.fixed:
            return 1
        raise
    return target.count


def _planned_model(model: ModelSpec, setup: TrainingSetup) -> PlannedModel:
    return PlannedModel(
        id=model.id,
        hub_id=model.hub_id,
        architecture=model.architecture,
        parameter_count=model.parameter_count,
        trainable_parameters=trainables(setup, model).elements,
        num_hidden_layers=model.num_hidden_layers,
        max_position_embeddings=model.max_position_embeddings,
        attn_implementation=attention_implementation(setup, model),
        source=model.source,
    )


def _schedule(request: PlanRequest, setup: TrainingSetup, model: ModelSpec, effective: int) -> Schedule:
    rate = request.learning_rate
    return Schedule(
        effective_batch_size=effective,
        learning_rate=policy.learning_rate(setup.method, model) if rate is None else float(rate),
        num_train_epochs=_epochs(request),
        lr_scheduler_type=policy.LR_SCHEDULER_TYPE,
        warmup_ratio=policy.WARMUP_RATIO,
    )


def summarise_data(path: str, stats: DatasetStats, setup: TrainingSetup) -> DataSummary:
    """What the setup's length and batch make of the data."""
    cut = stats.truncation(setup.max_length)
    if setup.packing:
        packed = stats.packing(setup.max_length)
        processed = packed.sequences * packed.sequence_length
    else:
        processed = stats.padding(setup.per_device_train_batch_size, setup.max_length).processed_tokens
    return DataSummary(
        path=path,
        format=stats.data_format,
        examples=stats.examples,
        total_tokens=stats.total_tokens,
        longest=stats.longest,
        percentile_99=stats.percentile(99.0),
        covered_percent=100.0 * (stats.examples - cut.examples) / stats.examples,
        truncated_examples=cut.examples,
        truncated_tokens=cut.tokens,
        processed_tokens=processed,
        estimated=stats.estimated,
    )


def _duration(
    best: Candidate, schedule: Schedule, data: DataSummary | None, target: GpuTarget, price: float | None
) -> Duration | None:
    if best.speed is None:
        return None
    from planner.cost import hours_for, run_cost

    steps = None
    if data is None:
        of, tokens = "one million tokens", TOKENS_WITHOUT_DATA
    else:
        of, tokens = "the data", round(data.processed_tokens * schedule.num_train_epochs)
        per_epoch = -(-data.examples // schedule.effective_batch_size)
        steps = max(1, round(per_epoch * schedule.num_train_epochs))
    compiling = compile_seconds(best.setup) / 3600
    hours = hours_for(tokens, best.speed.tokens_per_second) + compiling
    cost = run_cost(hours, target.spec, gpu_count=best.setup.num_processes, usd_per_gpu_hour=price)
    return Duration(
        of=of,
        tokens=tokens,
        steps=steps,
        hours=hours,
        hours_low=hours_for(tokens, best.speed.tokens_per_second_high) + compiling,
        hours_high=hours_for(tokens, best.speed.tokens_per_second_low) + compiling,
        usd_per_gpu_hour=None if cost is None else cost.usd_per_gpu_hour,
        usd=None if cost is None else cost.usd,
    )


def _methods(evaluator: Evaluator, best: Candidate, *, fits: bool) -> tuple[MethodFigures, ...]:
    """The plan's own method as planned; the others by the fitted estimate."""
    from planner.cards import smallest_gpu_for
    from planner.methods import with_method

    found = []
    for method in METHODS:
        own = method == best.setup.method
        candidate = best if own else evaluator.try_evaluate(with_method(best.setup, method))
        if candidate is None:
            continue
        gpu = smallest_gpu_for(candidate.setup, evaluator.model, candidate.peak_upper_bytes, confirm=False)
        if own and fits and (gpu is None or gpu.usable_bytes > evaluator.gpu.usable_bytes):
            gpu = evaluator.gpu
        found.append(
            MethodFigures(
                method=method,
                weights_bytes=candidate.memory.weights_bytes,
                allocated_bytes=candidate.memory.allocated_bytes,
                process_bytes=candidate.memory.process_bytes,
                peak_upper_bytes=candidate.peak_upper_bytes,
                fits=evaluator.fits(candidate),
                tokens_per_second=candidate.tokens_per_second,
                smallest_gpu=None if gpu is None else gpu.id,
            )
        )
    return tuple(found)


def _alternatives(chosen: _Chosen, evaluator: Evaluator) -> tuple[Alternative, ...]:
    best = chosen.tried.candidate
    found = []
    for one in chosen.result.tried:
        if one.candidate.setup == best.setup:
            continue
        candidate, rate = one.candidate, one.candidate.tokens_per_second
        if not one.fits:
            lost, amount = "too large", float(candidate.peak_upper_bytes - evaluator.usable_bytes)
        elif rate is not None and best.tokens_per_second and rate < best.tokens_per_second:
            lost, amount = "slower", 1.0 - rate / best.tokens_per_second
        else:
            fitted = [evaluator.evaluate(each.setup).peak_upper_bytes for each in (candidate, best)]
            lost, amount = "tie", float(fitted[0] - fitted[1])
        found.append(
            Alternative(
                strategy=one.strategy,
                per_device_train_batch_size=candidate.setup.per_device_train_batch_size,
                gradient_accumulation_steps=candidate.setup.gradient_accumulation_steps,
                peak_upper_bytes=candidate.peak_upper_bytes,
                tokens_per_second=rate,
                fits=one.fits,
                lost=lost,
                amount=amount,
            )
        )
    return tuple(found)


def _assumptions(
    request: PlanRequest,
    target: GpuTarget,
    setup: TrainingSetup,
    schedule: Schedule,
    stats: DatasetStats | None,
) -> tuple[str, ...]:
    found = list(target.notes)
    fixed = request.fixed
    if setup.num_processes < target.count:
        found.append(
            f"one of the {target.count} GPUs is used: the memory of a run on several is not modelled yet"
        )
    if "max_length" not in fixed:
        found.append(
            f"length {setup.max_length:,} tokens: no data was given"
            if stats is None
            else f"length {setup.max_length:,} tokens, to cover {policy.COVERAGE_PERCENT:g}% of the examples"
        )
    if setup.uses_lora and "lora_r" not in fixed:
        found.append(f"rank {DEFAULT_RANK}, the usual start")
    asked = schedule.effective_batch_size
    if request.effective_batch_size is None and asked != DEFAULT_EFFECTIVE_BATCH_SIZE:
        found.append(f"effective batch {asked}: what the fixed batch and accumulation give")
    elif request.effective_batch_size is None:
        found.append(f"effective batch {asked}, the usual one")
    if "dtype" not in fixed and setup.dtype == "float16":
        found.append(f"float16, because {target.spec.name} only emulates bfloat16")
    if request.learning_rate is None:
        found.append(f"learning rate {schedule.learning_rate:g} by method and model size")
    if stats is None:
        found.append("every sequence is full; time is for one million tokens (--data for yours)")
    else:
        if stats.estimated:
            found.append("token counts are estimated from the text's size, at 4 bytes a token")
        elif stats.longest < setup.max_length and not setup.packing:
            found.append(f"memory is for the longest example, {stats.longest:,} tokens")
        if request.num_train_epochs is None:
            found.append(f"{schedule.num_train_epochs:g} epochs, the usual number")
    return tuple(found)
