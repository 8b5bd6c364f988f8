"""make_plan: PlanRequest -> Plan."""

from __future__ import annotations

from dataclasses import replace

from planner.answers.plan import Advice, Alternative, MethodFigures, Plan, PlannedModel
from planner.data.lengths import DatasetStats
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.models.catalog import Inspector, resolve_model
from planner.models.spec import ModelSpec
from planner.planning.advice import make_it_fit, use_what_is_left
from planner.planning.assumptions import assumptions
from planner.planning.choosing import Chosen, choose, policy_lengths
from planner.planning.longest import longest_context
from planner.planning.needs import load_needs, model_notes
from planner.planning.other_cards import Question, other_cards
from planner.planning.schedule import make_duration, make_schedule, summarise_data
from planner.search import SPEED_TIE, Tried, finish_seconds
from planner.search.cards import smallest_card, smallest_gpu
from planner.search.evaluator import Candidate, Evaluator
from planner.search.frontier import around_the_chosen, frontier, runners_up
from planner.search.lean import smallest_that_fits
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, refuse_on_card
from planner.setup.methods import with_method
from planner.setup.request import PlanRequest
from planner.setup.run import TrainingRun
from planner.setup.training_setup import METHODS
from planner.throughput.epoch import Examples


def make_plan(
    request: PlanRequest,
    *,
    stats: DatasetStats | None = None,
    allow_network: bool = False,
    inspector: Inspector | None = None,
    target: GpuTarget | None = None,
    model: ModelSpec | None = None,
    longest: bool = False,
    methods: bool = True,
) -> Plan:
    """Choose the fastest setup that fits and say what it needs.

    `stats` are the lengths of the request's data where they have been measured with the model's tokenizer;
    without them they are estimated from the size of the texts.
    `inspector` describes models that equal none of the catalog (it needs the training stack); with
    `allow_network` the config of a Hub id may be fetched. `model` is the request's where it has been looked
    up already: describing one takes seconds. `target` stands in for the request's GPU: a card of which less
    is to be used than it has, or one that is known already. With `longest` the plan says how long sequences
    may be, with `methods` what other methods need and the smallest card for each: either takes as long as
    choosing does.

    Raises:
        InputError: model, GPU, data or knobs are not usable.
        MissingExtraError: the model's architecture needs the training stack, which is not installed.
    """
    target = resolve_gpu(request.gpu, display=request.display) if target is None else target
    refuse_on_card(request.fixed, target.spec, (*CARD_LIMITS, BFLOAT16))
    if model is None:
        model = resolve_model(request.model, allow_network=allow_network, inspector=inspector)
    if stats is None and request.data is not None:
        stats = read_stats(request.data)
    examples = None if stats is None else Examples(stats)
    evaluator = Evaluator(model, target.spec, target.usable_bytes, examples=examples)
    chosen = choose(request, target, evaluator, stats)
    plan = _plan(request, target, evaluator, stats, chosen)
    if methods:
        plan = replace(plan, methods=_methods(evaluator, request, chosen))
    if longest:
        plan = replace(plan, longest=longest_context(request, target, evaluator))
    return plan


def _plan(
    request: PlanRequest,
    target: GpuTarget,
    evaluator: Evaluator,
    stats: DatasetStats | None,
    chosen: Chosen,
) -> Plan:
    """What was chosen, and all that is said about it."""
    model, examples, best = evaluator.model, evaluator.examples, chosen.tried.candidate
    setup = best.setup
    schedule = make_schedule(request, setup, model, examples, chosen.effective_batch_size)
    data = None if examples is None else summarise_data(str(request.data), examples, setup)
    lengths = policy_lengths(request, model, stats)
    card = (
        None
        if chosen.fits
        else smallest_card(evaluator, setup, lengths, request.fixed, chosen.effective_batch_size)
    )
    duration = make_duration(best, schedule, target, request.price_usd_per_hour)
    question = Question(
        tried=chosen.result.tried,
        chosen=best,
        fits=chosen.fits,
        lengths=lengths,
        open_ended=stats is None and "max_length" not in request.fixed,
        fixed=frozenset(request.fixed),
        tokens=chosen.tokens,
        duration=duration,
        smallest=card,
    )
    others = _alternatives(chosen, evaluator)
    points = frontier(chosen.result.tried, chosen.tried, evaluator, tokens=chosen.tokens)
    return Plan(
        request=request,
        gpu=target,
        model=planned_model(evaluator.run(setup)),
        fits=chosen.fits,
        setup=setup,
        strategy=chosen.tried.strategy,
        schedule=schedule,
        memory=best.memory,
        speed=best.speed,
        duration=duration,
        loading=load_needs(evaluator.run(setup), best.memory),
        data=data,
        methods=(),
        alternatives=others,
        advice=_advice(request, target, evaluator, chosen),
        smallest_gpu=card,
        assumptions=assumptions(request, target, setup, schedule, data, chosen),
        notes=model_notes(model, setup, best.memory, target.usable_bytes),
        frontier=points,
        other_cards=other_cards(question, evaluator),
        neighbours=around_the_chosen(points),
        runners_up=runners_up(others, points, target.usable_bytes),
    )


def _advice(
    request: PlanRequest, target: GpuTarget, evaluator: Evaluator, chosen: Chosen
) -> tuple[Advice, ...]:
    setup = chosen.tried.candidate.setup
    if chosen.fits:
        return use_what_is_left(evaluator, setup, request, chosen.effective_batch_size)
    return make_it_fit(evaluator, setup, target)


def read_stats(path: str) -> DatasetStats:
    """Lengths of a data file, estimated from the size of its texts and remembered for as long as it stays.

    Raises:
        InputError: the file cannot be read or is not training data.
    """
    from pathlib import Path

    from planner.data.remembered import estimated_lengths

    return estimated_lengths(Path(path))


def planned_model(run: TrainingRun) -> PlannedModel:
    """What a plan says of the model of a run."""
    model = run.model
    return PlannedModel(
        id=model.id,
        hub_id=model.hub_id,
        architecture=model.architecture,
        parameter_count=model.parameter_count,
        trainable_parameters=run.trained.elements,
        num_hidden_layers=model.num_hidden_layers,
        max_position_embeddings=model.max_position_embeddings,
        attn_implementation=run.attention,
        source=model.source,
    )


def _methods(evaluator: Evaluator, request: PlanRequest, chosen: Chosen) -> tuple[MethodFigures, ...]:
    """The plan's own method as planned; the others in the plan's way where that fits, else in the leanest."""
    best = chosen.tried.candidate
    fixed = {name: value for name, value in request.fixed.items() if name != "method"}
    effective = chosen.effective_batch_size
    found = []
    for method in METHODS:
        own = method == best.setup.method
        candidate, fits = best, chosen.fits
        if not own:
            setup = with_method(best.setup, method)
            other = evaluator.try_evaluate(setup)
            if other is None:
                continue
            candidate, fits = other, evaluator.fits(other)
            lean = None
            if not fits:
                lean = smallest_that_fits(setup, evaluator, effective_batch_size=effective, fixed=fixed)
            if lean is not None:
                candidate, fits = lean, True
        gpu, _ = smallest_gpu(candidate.setup, evaluator.runs, fixed, effective)
        found.append(
            MethodFigures(
                method=method,
                weights_bytes=candidate.memory.weights_bytes,
                allocated_bytes=candidate.memory.allocated_bytes,
                process_bytes=candidate.memory.process_bytes,
                peak_upper_bytes=candidate.peak_upper_bytes,
                fits=fits,
                tokens_per_second=candidate.tokens_per_second,
                smallest_gpu=None if gpu is None else gpu.id,
            )
        )
    return tuple(found)


def _alternatives(chosen: Chosen, evaluator: Evaluator) -> tuple[Alternative, ...]:
    best = chosen.tried.candidate
    found = []
    for one in chosen.result.tried:
        if one.candidate.setup == best.setup:
            continue
        candidate = one.candidate
        lost, amount = _why_lost(one, best, chosen.tokens, evaluator.usable_bytes)
        found.append(
            Alternative(
                strategy=one.strategy,
                per_device_train_batch_size=candidate.setup.per_device_train_batch_size,
                gradient_accumulation_steps=candidate.setup.gradient_accumulation_steps,
                peak_upper_bytes=candidate.peak_upper_bytes,
                tokens_per_second=candidate.tokens_per_second,
                fits=one.fits,
                lost=lost,
                amount=amount,
            )
        )
    return tuple(found)


def _why_lost(one: Tried, best: Candidate, tokens: int, usable_bytes: int) -> tuple[str, float]:
    """Why a setup that was tried is not the plan's, and by how much, in Alternative's words."""
    candidate = one.candidate
    if not one.fits:
        return "too large", float(candidate.peak_upper_bytes - usable_bytes)
    seconds, least = (finish_seconds(each, tokens) for each in (candidate, best))
    given_up = 0.0 if seconds is None or least is None else max(0.0, 1 - least / seconds)
    if given_up > 1 - 1 / (1 + SPEED_TIE):
        return "slower", given_up
    if candidate.setup.activation_offloading and not best.setup.activation_offloading:
        return "offloads", given_up
    larger = candidate.peak_upper_bytes - best.peak_upper_bytes
    return ("tie", float(larger)) if larger > 0 else ("slower", given_up)
