"""What a sizing's run over its data comes to, by the planner's own schedule, summary and duration.

Made for a worker thread: with a hundred thousand examples it takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launcher.tui.command_line import request_of
from launcher.tui.sizing import Sizing, WholeRun, evaluator_of
from launcher.tui.text import plain
from planner.base.errors import InputError
from planner.data.batches import padding
from planner.planning.choosing import effective_batch_size
from planner.planning.schedule import make_duration, make_schedule, summarise_data
from planner.search.evaluator import Candidate
from planner.text.figures import dollars, duration, epochs
from planner.throughput.roofline import forecast


def with_whole_run(sizing: Sizing) -> Sizing:
    """The same with what its run comes to, or why none of the data can be trained; without data as it is."""
    if sizing.wishes.data is None:
        return sizing
    try:
        return replace(sizing, run=_whole_run(sizing))
    except InputError as error:
        return replace(sizing, no_run=str(error))


def _whole_run(sizing: Sizing) -> WholeRun | None:
    data, setup, card = sizing.wishes.data, sizing.setup, sizing.card
    if data is None:
        return None
    examples, request = data.examples, request_of(sizing)
    summary = summarise_data(data.path, examples, setup)
    evaluator = evaluator_of(sizing.model, card, sizing.wishes)
    wished = effective_batch_size(request, setup.num_processes)
    schedule = make_schedule(request, setup, sizing.model, examples, wished)
    epoch = None
    if sizing.step is not None:
        epoch = examples.epoch(setup, sizing.step, lambda one: forecast(evaluator.run(one), card.spec))
    run = Candidate(setup=setup, memory=sizing.memory, speed=sizing.step, epoch=epoch)
    unpacked = setup.replace(packing=False)
    return WholeRun(
        data=summary,
        schedule=schedule,
        duration=make_duration(run, schedule, card.target, request.price_usd_per_hour),
        padding=padding(examples.lengths(setup.max_length), examples.batches(unpacked)),
        packing=examples.packed(setup.max_length),
    )


def run_lines(sizing: Sizing, run: WholeRun) -> Iterator[tuple[str, str]]:
    """Steps, time and price of a whole run."""
    found, passes = run.duration, epochs(run.schedule.num_train_epochs)
    if found is None or found.steps is None:
        yield "time", plain(sizing.no_step) or "no forecast"
        return
    yield "steps", f"{found.steps:,} of {run.schedule.effective_batch_size:,} examples, {passes}"
    yield "time", duration(found.hours)
    yield "between", f"{duration(found.hours_low)} and {duration(found.hours_high)}"
    # Whose price it is, and of which day, stands beside the speed.
    if found.usd is None:
        yield "price", "not known: type one below the card"
    else:
        yield "price", f"{dollars(found.usd)} at ${found.usd_per_gpu_hour:g} a GPU-hour"
