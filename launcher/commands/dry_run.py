"""`vramwise train --dry-run`: what would be started, and what it would write, without either."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from launcher.runs.training_job import TrainingJob
from planner.answers.plan import Plan
from planner.text.figures import duration, gib, heading, pairs


def print_dry_run(out: Console, plan: Plan, job: TrainingJob, folder: Path) -> None:
    """Print what the run would do."""
    heading(out, "Dry run: nothing is started and nothing is written")
    pairs(out, _rows(plan, job, folder))


def _rows(plan: Plan, job: TrainingJob, folder: Path) -> Iterator[tuple[str, str]]:
    steps, hours = planned_steps(plan, job), planned_hours(plan, job)
    about = "" if job.max_steps is not None or not plan.setup.packing else "about "
    yield "steps", f"{about}{steps:,}" if steps is not None else "not known"
    if hours is not None:
        yield "time", f"about {duration(hours[0])} ({duration(hours[1])} to {duration(hours[2])})"
    yield "model", job.model_source
    yield "data", job.data_path
    if job.evaluates:
        yield "evaluation", _evaluation(job)
    yield "run folder", str(folder)
    yield "in it", "job.json, plan.json, events, samples, logs, report.md, report.json, loss.svg"
    saved = saved_bytes(plan)
    yield "adapter" if plan.setup.uses_lora else "model", f"{folder / 'adapter'}, {gib(saved)}"
    free = shutil.disk_usage(_existing(folder)).free
    yield "disk", f"{gib(free)} free there"


def planned_steps(plan: Plan, job: TrainingJob) -> int | None:
    """Optimizer steps of the run."""
    if job.max_steps is not None:
        return job.max_steps
    return None if plan.duration is None else plan.duration.steps


def planned_hours(plan: Plan, job: TrainingJob) -> tuple[float, float, float] | None:
    """Hours of the run and their interval; of fewer steps in proportion."""
    told = plan.duration
    if told is None or told.steps is None:
        return None
    share = 1.0 if job.max_steps is None else job.max_steps / told.steps
    return told.hours * share, told.hours_low * share, told.hours_high * share


def _evaluation(job: TrainingJob) -> str:
    split = job.eval_split
    if split is None:
        what = str(job.eval_data_path)
    elif split < 1:
        what = f"{split:.3g} of the data, which is not trained"
    else:
        what = f"{split:g} examples of the data, which are not trained"
    when = "after each epoch" if job.eval_steps is None else f"every {job.eval_steps:,} steps"
    patience = job.early_stopping_patience
    early = "" if patience is None else f"; the end where its loss has not fallen {patience} times in a row"
    return f"on {what}, {when}{early}"


def saved_bytes(plan: Plan) -> int:
    """What is trained, as it is saved."""
    parts = {part.name: part.size_bytes for part in plan.memory.components}
    return parts.get("adapter") or plan.memory.weights_bytes


def _existing(folder: Path) -> Path:
    """The folder that is there and that a run folder would be made in."""
    return next(path for path in (folder, *folder.parents) if path.exists())
