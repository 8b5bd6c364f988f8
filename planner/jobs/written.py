"""Files of a job: the plan, and what a service is given beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.answers.plan import Plan
from planner.base.data_files import write_all
from planner.jobs.job import RentedJob, job_of
from planner.planning.made_with import to_keep

PLAN = "plan.json"
INSTALL = "pip install 'vramwise[train]'"
WAITING_HOURS = 2
"""That dstack's task stays after the run, so that its result can be fetched (chosen)."""
_GIB = 2**30


def write_job(plan: Plan, service: str, folder: Path) -> tuple[Path, ...]:
    """Write a plan and its job into a folder, each file whole or not at all; the files that were written.

    Raises:
        InputError: the plan is none for a rented machine, or a folder that cannot be written to.
    """
    job = job_of(plan, service)
    texts = {
        PLAN: json.dumps(to_keep(plan).to_dict(), indent=2, allow_nan=False) + "\n",
        FILES[service]: job_text(plan, job, service),
    }
    return write_all(folder, texts)


def start_of(service: str) -> str:
    """The command that starts a job, in its folder."""
    return {"sky": f"sky launch {FILES['sky']}", "dstack": f"dstack apply -f {FILES['dstack']}"}[service]


def job_text(plan: Plan, job: RentedJob, service: str) -> str:
    """The job's file."""
    import yaml

    duration, memory = plan.duration, plan.memory
    assert duration is not None
    listed = duration.usd_per_gpu_hour
    price = "not limited: its price is not known (--price-per-hour USD)"
    if job.usd_per_hour is not None:
        source = (
            "as asked" if plan.request.price_usd_per_hour is not None else f"twice the listed ${listed:g}"
        )
        price = f"at most ${job.usd_per_hour:g} an hour for all cards ({source})"
    head = (
        f"Planned by vramwise: {plan.model.id} on {job.count} x {plan.gpu.spec.name}.",
        f"Memory: {memory.peak_bytes / _GIB:.2f} GiB of each card, "
        f"at most {memory.peak_upper_bytes / _GIB:.2f}.",
        f"Time: training takes about {_time(duration.hours)} ({_time(duration.hours_low)} to "
        f"{_time(duration.hours_high)}); after {job.hours} h it is ended, and saves.",
        f"Disk: {job.disk_gb} GB. Price: {price}.",
        f"Start: {start_of(service)}",
        f"Fetch what it made, runs/, before the machine is gone: {_FETCH[service].format(name=job.name)}",
    )
    values = yaml.safe_dump(_VALUES[service](job), sort_keys=False, allow_unicode=True, width=200)
    return "".join(f"# {line}\n" for line in head) + str(values)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(hours * 60))} min"


def _command(job: RentedJob) -> str:
    """The run; where its time is over it is interrupted, and saves."""
    words = [
        "vramwise",
        "train",
        "--plan",
        PLAN,
        "--data",
        job.data_name,
        "--runs",
        "runs",
        "--allow-download",
    ]
    return f"timeout --signal=INT --kill-after=30m {job.hours}h {shlex.join(words)}"


def _sky(job: RentedJob) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "accelerators": f"{job.card}:{job.count}",
        "disk_size": job.disk_gb,
        # Stopped, it keeps its disk.
        "autostop": {"idle_minutes": 15, "down": False},
    }
    if job.usd_per_hour is not None:
        resources["max_hourly_cost"] = job.usd_per_hour
    mounts = {f"~/sky_workdir/{PLAN}": PLAN}
    if job.data is not None:
        mounts[f"~/sky_workdir/{job.data_name}"] = str(job.data)
    run = f"cd ~/sky_workdir && {_command(job)}"
    return {"name": job.name, "resources": resources, "file_mounts": mounts, "setup": INSTALL, "run": run}


def _dstack(job: RentedJob) -> dict[str, Any]:
    name, _, memory = job.card.partition(":")
    files = [f"{PLAN}:{PLAN}"]
    if job.data is not None:
        files.append(f"{job.data}:{job.data_name}")
    found: dict[str, Any] = {
        "type": "task",
        "name": job.name,
        "python": "3.12",
        "files": files,
        # The container is gone with the task's end.
        "commands": [
            INSTALL,
            f"({_command(job)}; code=$?; test -d runs && sleep {WAITING_HOURS}h; exit $code)",
        ],
        "resources": {
            "gpu": {"name": name, "memory": memory, "count": job.count},
            "disk": f"{job.disk_gb}GB..",
        },
        "max_duration": f"{job.hours + WAITING_HOURS + 1}h",
    }
    return found if job.usd_per_hour is None else {**found, "max_price": job.usd_per_hour}


_FETCH = {
    "sky": "rsync -r {name}:sky_workdir/runs . (its cluster's name; then sky down)",
    "dstack": "scp -r {name}:/workflow/runs . (then dstack stop {name})",
}
FILES = {"sky": "sky.yaml", "dstack": "vramwise.dstack.yml"}
_VALUES: dict[str, Callable[[RentedJob], dict[str, Any]]] = {"sky": _sky, "dstack": _dstack}
