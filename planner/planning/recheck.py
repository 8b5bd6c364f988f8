"""A plan made before, and perhaps elsewhere, on what is here: its setup is kept, its figures are not."""

from __future__ import annotations

import dataclasses

from planner.answers.plan import Plan
from planner.gpus.target import GpuTarget
from planner.models.spec import ModelSpec
from planner.planning.make_plan import planned_model
from planner.planning.needs import load_needs, model_notes
from planner.planning.schedule import make_duration, summarise_data
from planner.search.evaluator import Evaluator
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, refuse_on_card
from planner.throughput.epoch import Examples


def recheck(plan: Plan, *, model: ModelSpec, target: GpuTarget, data: str, examples: Examples) -> Plan:
    """The plan's setup and schedule on this model, card and data, estimated as make_plan estimates.

    What was said of other setups and cards is left out: it was worked out for something else.

    Raises:
        InputError: the card cannot run the setup, or the model has not what it asks for.
        NotModelledError: a knob whose memory is not modelled (any more).
    """
    setup = plan.setup
    refuse_on_card(setup.to_dict(), target.spec, (*CARD_LIMITS, BFLOAT16))
    if setup.num_processes > 1:
        target = target.of_all()
    evaluator = Evaluator(model, target.spec, target.usable_bytes, examples=examples)
    found = evaluator.confirm(setup, whole=True)
    run = evaluator.run(setup)
    return dataclasses.replace(
        plan,
        request=dataclasses.replace(plan.request, data=data),
        gpu=target,
        model=planned_model(run, target.spec),
        fits=evaluator.fits(found),
        memory=found.memory,
        speed=found.speed,
        duration=make_duration(found, plan.schedule, target, plan.request.price_usd_per_hour),
        loading=load_needs(run),
        data=summarise_data(data, examples, setup),
        notes=model_notes(model, setup, found.memory, target.usable_bytes),
        methods=(),
        alternatives=(),
        advice=(),
        smallest_gpu=None,
        smallest_cards=(),
        frontier=(),
        other_cards=(),
        longest=None,
        made_with=(),
        ways=(),
        neighbours=(),
        runners_up=(),
    )
