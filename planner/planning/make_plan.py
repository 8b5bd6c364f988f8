"""make_plan: PlanRequest -> Plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from planner.answers.plan import Alternative, FrontierPoint, Plan, PlannedModel, WayFigures
from planner.base.errors import InputError
from planner.base.spread import beside
from planner.data.image_rule import ImageRule
from planner.data.lengths import DatasetStats
from planner.gpus.spec import GpuSpec
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.models.catalog import Inspector, catalog_id, resolve_model
from planner.models.spec import ModelSpec
from planner.planning.advice import advice
from planner.planning.asked import Asked
from planner.planning.assumptions import assumptions
from planner.planning.choosing import Chosen
from planner.planning.longest import longest_context
from planner.planning.methods import method_figures
from planner.planning.needs import load_needs, model_notes
from planner.planning.other_cards import other_cards, smallest_cards
from planner.planning.schedule import make_duration, make_schedule, summarise_data
from planner.planning.ways import with_processes
from planner.search import SPEED_TIE, Tried, finish_seconds
from planner.search.evaluator import Candidate
from planner.search.frontier import around_the_chosen, frontier, runners_up, settled
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, refuse_on_card
from planner.setup.methods import as_stored_request
from planner.setup.request import PlanRequest
from planner.setup.run import Runs, TrainingRun
from planner.setup.stack import TRL, Stack
from planner.throughput.torch_attention import kernels_of

SHOWN_ADVICE = 3
"""Advice to make a plan fit that the short page has room for."""


def make_plan(
    request: PlanRequest,
    *,
    stats: DatasetStats | None = None,
    allow_network: bool = False,
    inspector: Inspector | None = None,
    target: GpuTarget | None = None,
    model: ModelSpec | None = None,
    longest: bool = False,
    whole: bool = True,
    stack: Stack = TRL,
    processes: int = 1,
) -> Plan:
    """Choose the fastest setup that fits and say what it needs.

    `stats` are the lengths of the request's data where they have been measured with the model's tokenizer;
    without them they are estimated from the size of the texts.
    `inspector` describes models that equal none of the catalog (it needs the training stack); with
    `allow_network` the config of a Hub id may be fetched. `model` is the request's where it has been looked
    up already: describing one takes seconds. `target` stands in for the request's GPU: a card of which less
    is to be used than it has, or one that is known already. With `longest` the plan says how long sequences
    may be, which takes as long as choosing does. Not `whole`, it has what the short page shows: what is said
    of other methods, ranks and cards takes a search each. `stack` is the trainer that memory is counted for.
    With several `processes` (planner.base.spread) the longest sequences are looked for beside the rest.

    Raises:
        InputError: model, GPU, data or knobs are not usable.
        MissingExtraError: the model's architecture needs the training stack, which is not installed.
    """
    target = resolve_gpu(request.gpu, display=request.display) if target is None else target
    refuse_on_card(request.fixed, target.spec, (*CARD_LIMITS, BFLOAT16))
    if stats is None and request.data is not None:
        stats = read_stats(request.data)
    images = stats is not None and stats.images > 0
    if model is None:
        model = resolve_model(request.model, allow_network=allow_network, inspector=inspector, images=images)
    request = as_stored_request(request, model)
    if stats is not None and images:
        request, stats = with_images(request, model, stats)
    asked = Asked(request, with_processes(request, target), model, stats, runs=Runs(model, stack))
    if not longest:
        return _as_asked(asked, whole=whole)
    look = partial(longest_context, request, target, asked.evaluator)
    with beside(look, processes) as found:
        return replace(_as_asked(asked, whole=whole), longest=found())


def _as_asked(asked: Asked, *, whole: bool) -> Plan:
    """The plan without the longest sequences."""
    plan = _plan(asked)
    if whole:
        return _with_all_around(asked, plan)
    return plan if plan.fits else replace(plan, advice=advice(asked, most=SHOWN_ADVICE))


def _plan(asked: Asked) -> Plan:
    """What was chosen, and all that is said about it."""
    request, target, model, chosen = asked.request, asked.way.target, asked.model, asked.chosen
    examples, best = asked.evaluator.examples, chosen.tried.candidate
    setup = best.setup
    schedule = make_schedule(request, setup, model, examples, chosen.effective_batch_size)
    data = None if examples is None else summarise_data(str(request.data), examples, setup)
    cards = () if chosen.fits else smallest_cards(asked)
    run = asked.way.evaluator.run(setup)
    return Plan(
        request=request,
        gpu=target,
        model=planned_model(run, target.spec),
        fits=chosen.fits,
        setup=setup,
        strategy=chosen.tried.strategy,
        schedule=schedule,
        memory=best.memory,
        speed=best.speed,
        duration=make_duration(best, schedule, target, request.price_usd_per_hour),
        loading=load_needs(run),
        data=data,
        methods=(),
        alternatives=(),
        advice=(),
        smallest_gpu=min(cards, key=lambda one: one.usable_bytes, default=None),
        smallest_cards=cards,
        assumptions=assumptions(request, target, setup, schedule, data, chosen),
        notes=model_notes(model, setup, best.memory, target.usable_bytes),
        ways=_ways(asked),
    )


def _ways(asked: Asked) -> tuple[WayFigures, ...]:
    """The ways to use several GPUs, where the request leaves that open."""
    if len(asked.ways) == 1:
        return ()
    from planner.planning.sharing import way_figures

    return way_figures(asked)


def _with_all_around(asked: Asked, plan: Plan) -> Plan:
    """The plan with what else was tried, and what is said of other methods, changes and cards."""
    chosen, evaluator = asked.chosen, asked.way.evaluator
    tried = settled(chosen.result.tried, evaluator)
    points = frontier(tried, chosen.tried, evaluator, tokens=chosen.tokens)
    others = _alternatives(chosen, tried, points, evaluator.usable_bytes)
    return replace(
        plan,
        methods=method_figures(asked),
        alternatives=others,
        advice=advice(asked),
        frontier=points,
        other_cards=other_cards(asked, plan.duration, plan.smallest_cards),
        neighbours=around_the_chosen(points),
        runners_up=runners_up(others, points, evaluator.usable_bytes),
    )


def with_images(
    request: PlanRequest, model: ModelSpec, stats: DatasetStats
) -> tuple[PlanRequest, DatasetStats]:
    """A request whose sequences have as many patches as those of its data, and the data as the model's image
    processor makes tokens of it.

    Raises:
        InputError: the model sees no images.
    """
    if model.tower is None:
        raise InputError(f"the data has images, and {model.id} is described as a model of text alone")
    if not stats.image_patches and request.data is not None:
        stats = read_stats(request.data, model.tower.rule)
    if catalog_id(request.model) is not None:
        # The name of its language model may have been meant for the whole.
        request = replace(request, model=model.id)
    if "image_patches" not in request.fixed:
        request = request.with_knobs({"image_patches": stats.image_patches})
    return request, stats


def read_stats(path: str, rule: ImageRule | None = None) -> DatasetStats:
    """Lengths of a data file, estimated from the size of its texts and remembered for as long as it stays;
    with the tokens that a model's `rule` makes of images.

    Raises:
        InputError: the file cannot be read or is not training data.
    """
    from pathlib import Path

    from planner.data.remembered import estimated_lengths

    return estimated_lengths(Path(path), rule)


def planned_model(run: TrainingRun, gpu: GpuSpec) -> PlannedModel:
    """What a plan says of the model of a run on a card."""
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
        attention_kernels=tuple(kernel.name for kernel in kernels_of(run, gpu.compute_capability)),
    )


def _alternatives(
    chosen: Chosen, tried: Sequence[Tried], points: Sequence[FrontierPoint], usable_bytes: int
) -> tuple[Alternative, ...]:
    """What else was tried, in the figures of the frontier where it is there."""
    best = chosen.tried.candidate
    replayed = {point.setup: point for point in points}
    found = []
    for one in tried:
        candidate, point = one.candidate, replayed.get(one.candidate.setup)
        if candidate.setup == best.setup:
            continue
        peak = candidate.peak_upper_bytes if point is None else point.peak_upper_bytes
        fits = one.fits if point is None else point.fits
        lost, amount = _why_lost(candidate, best, chosen.tokens, peak - best.peak_upper_bytes)
        if not fits:
            lost, amount = "too large", float(peak - usable_bytes)
        found.append(
            Alternative(
                strategy=one.strategy,
                per_device_train_batch_size=candidate.setup.per_device_train_batch_size,
                gradient_accumulation_steps=candidate.setup.gradient_accumulation_steps,
                peak_upper_bytes=peak,
                tokens_per_second=candidate.tokens_per_second,
                fits=fits,
                lost=lost,
                amount=amount,
            )
        )
    return tuple(found)


def _why_lost(candidate: Candidate, best: Candidate, tokens: int, larger: int) -> tuple[str, float]:
    """Why a setup that fits is not the plan's, and by how much, in Alternative's words."""
    seconds, least = (finish_seconds(each, tokens) for each in (candidate, best))
    given_up = 0.0 if seconds is None or least is None else max(0.0, 1 - least / seconds)
    if given_up > 1 - 1 / (1 + SPEED_TIE):
        return "slower", given_up
    if candidate.setup.activation_offloading and not best.setup.activation_offloading:
        return "offloads", given_up
    return ("tie", float(larger)) if larger > 0 else ("slower", given_up)
