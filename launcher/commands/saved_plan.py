"""`vramwise train --plan FILE`: a saved plan, what may be asked beside it, what differs here."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.answers.plan import DataSummary, Plan, Release
from planner.base.data_files import read_json
from planner.base.errors import InputError
from planner.commands.knobs import given_knobs
from planner.commands.program import say
from planner.text.figures import gib

if TYPE_CHECKING:
    from planner.data.lengths import DatasetStats
    from planner.gpus.target import GpuTarget
    from planner.models.spec import ModelSpec


def take_saved_plan(args: argparse.Namespace) -> Plan:
    """Read the plan that `--plan` names; what it says of model and data stands in where nothing was given.

    Raises:
        InputError: not a plan, or an option asks for something else than the plan has; it is named.
    """
    plan = read_json(args.plan.expanduser(), Plan.from_dict)
    for option, asked, planned in _asked_beside(args, plan):
        if asked is not None and asked not in planned:
            raise InputError(
                f"{option} {_shown(asked)} contradicts {args.plan}, which has {_shown(planned[0])}: "
                "leave it out, or make another plan"
            )
    if args.model is None:
        args.model = plan.request.model
    if args.data is None:
        args.data = plan.request.data
    return plan


def _asked_beside(args: argparse.Namespace, plan: Plan) -> Iterator[tuple[str, object, tuple[object, ...]]]:
    """(option, what it asks for or None, what the plan has, by all its names)."""
    request, gpu = plan.request, plan.gpu
    yield "--gpu", args.gpu, (gpu.text, gpu.spec.id, request.gpu)
    yield "--epochs", args.epochs, (plan.schedule.num_train_epochs,)
    yield "--learning-rate", args.learning_rate, (plan.schedule.learning_rate,)
    batches = (plan.schedule.effective_batch_size, request.effective_batch_size)
    yield "--effective-batch-size", args.effective_batch_size, batches
    yield "--price-per-hour", args.price_per_hour, (request.price_usd_per_hour,)
    yield "--display", args.display or None, (request.display,)
    for name, value in given_knobs(args):
        yield "--" + name.replace("_", "-"), value, (getattr(plan.setup, name),)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def plan_for_here(
    plan: Plan,
    *,
    name: str,
    model: ModelSpec,
    stats: DatasetStats,
    data: str,
    on_gpu: bool,
    nnodes: int = 1,
) -> Plan:
    """The plan as it is where versions, card, model and data are its own; else its setup estimated anew, with
    a line for each difference. `name` is what the model was asked for by.

    Raises:
        InputError: another model was asked for; or see planner.planning.recheck.recheck.
    """
    from planner.gpus.target import resolve_gpu
    from planner.planning import made_with
    from planner.planning.recheck import recheck
    from planner.planning.schedule import summarise_data
    from planner.throughput.epoch import Examples

    others = [*_of_model(plan, model)]
    if others and name != plan.request.model:
        raise InputError(f"--model {name} contradicts the plan, which is for {plan.model.id}: {others[0]}")
    target = resolve_gpu(None) if on_gpu else plan.gpu
    here = max(1, plan.setup.num_processes // nnodes)
    if on_gpu and here > target.count:
        raise InputError(
            f"the plan is for {here} GPUs here, and there are {target.count} of {target.spec.id}"
        )
    if here > 1:
        target = target.of_all()
    examples = Examples(stats)
    summary = summarise_data(data, examples, plan.setup)
    differences = [
        *others,
        *_of_versions(plan.made_with, made_with.installed()),
        *_of_card(plan, target),
        *_of_data(plan.data, summary),
    ]
    if not differences:
        say("the plan is launched as it is: versions, card and data are those that it was made for")
        # The card may be another of its kind, the file may have another name.
        request = dataclasses.replace(plan.request, data=data)
        return dataclasses.replace(plan, request=request, gpu=target, data=summary)
    anew = recheck(plan, model=model, target=target, data=data, examples=examples)
    for line in differences:
        say(line)
    before, after = (gib(one.memory.peak_upper_bytes) for one in (plan, anew))
    say(f"so its setup is estimated anew: at most {after} (in the plan {before})")
    return anew


def _of_model(plan: Plan, model: ModelSpec) -> Iterator[str]:
    planned = plan.model
    has = (model.parameter_count, model.num_hidden_layers)
    if has != (planned.parameter_count, planned.num_hidden_layers):
        yield (
            f"the model here has {model.parameter_count:,} parameters in {model.num_hidden_layers} layers, "
            f"the plan's {planned.parameter_count:,} in {planned.num_hidden_layers}"
        )


def _of_versions(planned: tuple[Release, ...], installed: tuple[Release, ...]) -> Iterator[str]:
    """Packages of which another release was installed where the plan was made; what was not installed there
    has not changed its figures.
    """
    if not planned:
        yield "the plan does not say with which versions it was made"
    here = {one.name: one.version for one in installed}
    for one in planned:
        if one.name in here and _release(here[one.name]) != _release(one.version):
            yield f"{one.name} {here[one.name]} is installed, the plan was made with {one.version}"


def _release(version: str) -> str:
    """Without the build: 2.13.0+cpu is 2.13.0."""
    return version.partition("+")[0]


def _of_card(plan: Plan, target: GpuTarget) -> Iterator[str]:
    planned = plan.gpu
    if (planned.spec.id, planned.spec.memory_bytes) != (target.spec.id, target.spec.memory_bytes):
        yield f"the card here is {target.spec.id}, the plan is for {planned.spec.id}"
    elif target.usable_bytes < planned.usable_bytes:
        free, counted_on = gib(target.usable_bytes), gib(planned.usable_bytes)
        yield f"{free} of the card are free, the plan counts on {counted_on}"


def _of_data(planned: DataSummary | None, here: DataSummary) -> Iterator[str]:
    if planned is None:
        yield "the plan was made without data"
        return
    names = ("examples", "total_tokens", "longest")
    if any(getattr(planned, name) != getattr(here, name) for name in names):
        about = "about " if planned.estimated else ""
        yield (
            f"the data has {here.examples:,} examples of {here.total_tokens:,} tokens, the longest "
            f"{here.longest:,}; in the plan {planned.examples:,} of {about}{planned.total_tokens:,}, the "
            f"longest {about}{planned.longest:,}"
        )
