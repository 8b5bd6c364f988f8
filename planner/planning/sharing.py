"""Ways to use several GPUs beside each other: what a plan answers for each, and why it is not taken."""

from __future__ import annotations

from typing import Any

from planner.answers.plan import WayFigures
from planner.base.errors import InputError
from planner.planning.asked import Asked
from planner.planning.schedule import make_duration, make_schedule
from planner.search import SPEED_TIE, finish_seconds


def way_figures(asked: Asked) -> tuple[WayFigures, ...]:
    """A row a way."""
    return tuple(_figures(asked, way) for way in asked.ways)


def _figures(asked: Asked, way: Asked) -> WayFigures:
    fixed = way.request.fixed
    distributed, count = fixed.get("distributed"), fixed["num_processes"]
    named: dict[str, Any] = {"distributed": distributed, "num_processes": count}
    try:
        found = way.chosen
    except InputError as error:
        return WayFigures(**named, fits=False, lost="refused", amount=0.0, reason=str(error))
    best = found.tried.candidate
    schedule = make_schedule(
        way.request, best.setup, way.model, way.evaluator.examples, found.effective_batch_size
    )
    takes = make_duration(best, schedule, way.target, way.request.price_usd_per_hour)
    lost, amount = ("", 0.0) if way is asked.way else _why_lost(asked, way)
    return WayFigures(
        **named,
        fits=found.fits,
        lost=lost,
        amount=amount,
        max_length=best.setup.max_length,
        peak_upper_bytes=best.peak_upper_bytes,
        tokens_per_second=best.tokens_per_second,
        hours=None if takes is None else takes.hours,
        usd=None if takes is None else takes.usd,
    )


def _why_lost(asked: Asked, way: Asked) -> tuple[str, float]:
    """Why a way is not the plan's, and by how much, in WayFigures' words."""
    found, chosen = way.chosen, asked.chosen
    best, taken = found.tried.candidate, chosen.tried.candidate
    if not found.fits:
        return "too large", float(best.peak_upper_bytes - way.target.usable_bytes)
    if best.setup.max_length < taken.setup.max_length:
        return "shorter", float(taken.setup.max_length - best.setup.max_length)
    seconds, least = (finish_seconds(one, chosen.tokens) for one in (best, taken))
    given_up = 0.0 if seconds is None or least is None else max(0.0, 1 - least / seconds)
    return ("slower", given_up) if given_up > 1 - 1 / (1 + SPEED_TIE) else ("tie", given_up)
