"""Make a run folder for a sizing and start its processes; blocks, so made for a worker thread."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.runs import stack, supervisor
from launcher.runs.folder import RunFolder
from launcher.runs.job import JobWish, create_planned_run
from launcher.runs.kept import fingerprint, resumption
from launcher.runs.minding.gpu_lock import GpuBusyError
from launcher.runs.minding.gpu_room import in_the_way
from launcher.runs.report.facts import plan_or_none
from launcher.runs.weights import require_weights
from launcher.tui.cards import visible_gpus
from launcher.tui.command_line import request_of
from launcher.tui.dataset import read_dataset
from launcher.tui.screens.start_run import RunWish
from launcher.tui.sizing import Sizing, evaluator_of
from launcher.tui.text import size
from launcher.tui.whole_run import run_lines, with_whole_run
from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.data.files import on_this_machine
from planner.planning.make_plan import make_plan
from planner.planning.needs import load_needs
from planner.setup.defaults import KEPT_CHECKPOINTS


class NotFreeError(InputError):
    """A GPU at one of `positions` is not free: another run trains on it, or, where `need_bytes` is known,
    others hold memory that the run needs.
    """

    def __init__(self, message: str, positions: Sequence[int], need_bytes: int | None) -> None:
        self.positions = positions
        self.need_bytes = need_bytes
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Started:
    """A started run; `handle` keeps its processes from being reaped by nobody."""

    folder: RunFolder
    handle: supervisor.RunHandle


def refuse_what_cannot_start(sizing: Sizing) -> None:
    """Say what stands in the way of training before anything is asked.

    Raises:
        MissingExtraError: the training stack is not installed.
        InputError: more GPUs than this machine has.
    """
    stack.require("training")
    wanted = sizing.setup.num_processes
    if wanted > 1 and (there := visible_gpus()) < wanted:
        raise InputError(f"{wanted} GPUs are sized, and this machine has {there}")


def start(sizing: Sizing, wish: RunWish, *, allow_download: bool = False) -> Started:
    """Write job.json and plan.json into a new run folder and start trainer and sampler.

    Raises:
        NotFreeError: the GPU is not free, which may be waited for; nothing was made.
        VramwiseError: the job is not possible, its weights or data are not on this machine and may not be
            fetched, or the processes cannot be started.
    """
    require_weights(
        wish.model_source, download_bytes=sizing.model.download_bytes, allow_download=allow_download
    )
    data = on_this_machine(str(wish.data), allow_network=allow_download)
    wish = replace(wish, data=Path(data))
    job = JobWish(
        model_source=wish.model_source,
        data=wish.data,
        max_steps=wish.max_steps,
        eval_data=wish.eval_data,
        eval_split=wish.eval_split,
        seed=wish.seed,
        assistant_only_loss=wish.assistant_only_loss,
        allow_download=allow_download,
    )
    first = sizing.card.target.first_position(sizing.setup.num_processes)
    positions = range(first, first + sizing.setup.num_processes)
    _refuse_what_is_not_free(positions, None)
    plan = _plan(sizing, wish)
    _refuse_what_is_not_free(positions, plan.memory.peak_upper_bytes)
    folder = create_planned_run(wish.runs, plan, job, name=wish.name)
    try:
        return Started(folder, supervisor.start(folder.path))
    except GpuBusyError as error:
        # Taken since it was looked at.
        shutil.rmtree(folder.path, ignore_errors=True)
        raise NotFreeError(str(error), positions, None) from error


def resume(folder: RunFolder) -> Started:
    """Go on with a run that has ended, from its newest whole checkpoint.

    Raises:
        VramwiseError: the run cannot go on, or its GPU is not free.
    """
    stack.require("resuming a run")
    going_on = resumption.prepare(folder, resumption.ResumeWish())
    job, plan = going_on.attempt.apply(folder.read_job()), plan_or_none(folder)
    need = None if plan is None else plan.memory.peak_upper_bytes
    _refuse_what_is_not_free(range(job.gpu_index, job.gpu_index + job.local_processes), need)
    try:
        fingerprint.write(folder, going_on.fingerprint)
    except OSError as error:
        raise InputError(f"{folder.fingerprint}: cannot be written ({error.strerror})") from error
    return Started(folder, supervisor.resume(folder.path, going_on.attempt))


def foresee(sizing: Sizing, data: str, epochs: float | None) -> str:
    """What a run of a sizing on data comes to, in a line: steps, time, price, what it writes.

    Raises:
        VramwiseError: the data cannot be read, or none of it can be trained.
    """
    known = sizing.wishes.data
    read = known if known is not None and known.path == data else read_dataset(data)
    wishes = replace(sizing.wishes, data=read, num_train_epochs=epochs)
    found = with_whole_run(replace(sizing, wishes=wishes, run=None, no_run=""))
    if found.run is None:
        raise InputError(found.no_run)
    parts = [f"{label} {value}" for label, value in run_lines(found, found.run)]
    needs = load_needs(evaluator_of(sizing.model, sizing.card, wishes).run(sizing.setup))
    written = needs.written_bytes(KEPT_CHECKPOINTS)
    parts.append(f"disk {size(written)}, the adapter and {KEPT_CHECKPOINTS + 1} checkpoints at most")
    return "; ".join(parts)


def _refuse_what_is_not_free(positions: Sequence[int], need_bytes: int | None) -> None:
    if (reason := first_in_the_way(positions, need_bytes)) is not None:
        raise NotFreeError(reason, positions, need_bytes)


def first_in_the_way(positions: Sequence[int], need_bytes: int | None) -> str | None:
    """What is in the way on the first of several GPUs that has something there, in a sentence."""
    found = (in_the_way(position, need_bytes) for position in positions)
    return next((reason for reason in found if reason is not None), None)


def _plan(sizing: Sizing, wish: RunWish) -> Plan:
    """The plan of exactly this setup on exactly this card, on the data that will be trained on."""
    request = request_of(
        sizing,
        data=str(wish.data),
        num_train_epochs=wish.num_train_epochs,
        learning_rate=wish.learning_rate,
    )
    return make_plan(request, model=sizing.model, target=sizing.card.target, whole=False)
