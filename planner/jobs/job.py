"""RentedJob: what a plan asks of a rented machine."""

from __future__ import annotations

import math
import re
from pathlib import Path

from planner.answers.plan import Plan
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass
from planner.data.files import named_on_hub
from planner.gpus.rented import rented_names
from planner.trainers.names import JOB_SERVICES

SERVICES = JOB_SERVICES
STACK_BYTES = 40 * 10**9
"""On the disk beside the run: the system's image, CUDA's torch and the packages (chosen)."""
READY_HOURS = 1.0
"""Before the first step: packages and weights are fetched (chosen)."""
LIST_PRICES = 2.0
"""How much more than the listed price may be paid where none was named: that is one provider's (chosen)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RentedJob:
    """What is rented, and for how long at most.

    `card` is the service's name of it, `disk_gb` in units of 10^9 bytes, `hours` the longest that the run may
    take, `usd_per_hour` the most that all `count` cards may cost (null: not limited). `data` is the file that
    goes with it, null where `data_name` is a data set of the Hub.
    """

    name: str
    card: str
    count: int
    disk_gb: int
    hours: int
    usd_per_hour: float | None
    data: Path | None
    data_name: str


def job_of(plan: Plan, service: str) -> RentedJob:
    """The job of a plan.

    Raises:
        InputError: the plan does not say how long it takes, or cannot be run from elsewhere.
    """
    if service not in SERVICES:
        raise FieldError("--job", service, "one of " + ", ".join(SERVICES))
    request, duration, gpu = plan.request, plan.duration, plan.gpu
    if not plan.fits:
        raise InputError("--job: the plan does not fit")
    if request.data is None or duration is None or plan.data is None:
        raise InputError("--job needs --data: time and disk follow from the examples")
    if plan.loading.disk_bytes is None or Path(plan.request.model).expanduser().is_dir():
        raise InputError(f"--job: the weights of {plan.model.id} are not on the Hub")
    count = plan.setup.num_processes
    data = None if named_on_hub(Path(request.data)) else Path(request.data).expanduser().resolve()
    if data is not None and not data.is_file():
        raise InputError(f"--job: {request.data} is no file, which alone is sent with a job")
    return RentedJob(
        name=re.sub(r"[^a-z0-9]+", "-", f"vramwise-{plan.model.id}".lower())[:40].strip("-"),
        card=card_name(gpu.spec.id, service),
        count=count,
        disk_gb=math.ceil((plan.loading.disk_bytes + STACK_BYTES) / 1e9),
        hours=math.ceil(duration.hours_high + READY_HOURS),
        usd_per_hour=_most(plan, count),
        data=data,
        data_name=request.data if data is None else data.name,
    )


def card_name(gpu_id: str, service: str) -> str:
    """What a service calls a card.

    Raises:
        InputError: it offers none by a name that is known.
    """
    found = rented_names().get(gpu_id, {}).get(service)
    if found is None:
        others = ", ".join(sorted(name for name, known in rented_names().items() if service in known))
        raise InputError(f"--job {service} has no {gpu_id}: it has {others}")
    return found


def _most(plan: Plan, count: int) -> float | None:
    """What all cards may cost an hour: the price that was named, or so much more than the listed one."""
    named = plan.request.price_usd_per_hour
    if named is not None:
        return round(named * count, 2)
    listed = None if plan.duration is None else plan.duration.usd_per_gpu_hour
    return None if listed is None else round(LIST_PRICES * listed * count, 2)
