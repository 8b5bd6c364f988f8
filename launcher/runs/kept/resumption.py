"""Whether and how a run that has ended goes on: from its newest whole checkpoint, on what it was started on.

Light: no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.runs import supervisor
from launcher.runs.attempts import Attempt, first_attempt, read_attempts
from launcher.runs.events import StartEvent, read_events
from launcher.runs.folder import RunBusyError, RunFolder
from launcher.runs.kept import checkpoints, fingerprint
from launcher.runs.kept.checkpoints import Checkpoint
from launcher.runs.kept.fingerprint import Difference, Fingerprint
from launcher.runs.kept.shards import refuse_unsharded
from launcher.runs.training_job import OWN_ENGINE
from planner.base import validate
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup

NO_FINGERPRINT = "what the run was started on is not known: it has no fingerprint.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeWish:
    """What a person asks of a resumption: other epochs or steps, another number of processes or another way
    to share the work (null: as before), and the kinds of differences (fingerprint.KINDS) that they accept.
    """

    num_train_epochs: float | None = None
    max_steps: int | None = None
    num_processes: int | None = None
    distributed: str | None = None
    accepted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_train_epochs is not None:
            validate.number("epochs", self.num_train_epochs, minimum=1e-6, maximum=1e6)
        if self.max_steps is not None:
            validate.integer("max_steps", self.max_steps, minimum=1, maximum=10**9)
        if self.num_processes is not None:
            validate.integer("--num-processes", self.num_processes, minimum=1, maximum=2**14)
        for kind in self.accepted:
            validate.choice("accept_changes", kind, fingerprint.KINDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """How a run goes on: the attempt to make, the checkpoint that it goes on from (null: from the beginning),
    of each newer folder that is no whole checkpoint why, and the fingerprint that holds from here on.
    """

    attempt: Attempt
    checkpoint: Checkpoint | None
    broken: tuple[str, ...]
    fingerprint: Fingerprint


def prepare(folder: RunFolder, wish: ResumeWish) -> Resumption:
    """See how a run goes on; changes nothing.

    Raises:
        RunBusyError: it is running.
        InputError: it has not been started or is finished; data, model, versions or job are not what they
            were and that is not accepted; there is nothing left to do, or no room.
    """
    now = supervisor.status(folder.path)
    if now.alive:
        raise RunBusyError(f"{folder.path}: this run is running (pid {now.pid})")
    if now.state in ("created", "finished"):
        why = "has not been started" if now.state == "created" else "is finished; nothing is left to do"
        raise InputError(f"{folder.path}: this run {why}")
    job = folder.read_job()
    if job.engine != OWN_ENGINE:
        raise InputError(f"{folder.path}: {job.engine} saves no checkpoints that a run could go on from")
    found = checkpoints.newest(folder.checkpoints)
    current = fingerprint.take(job)
    accepted = _accepted(folder, current, wish, trained=bool(found.newest or found.broken))
    last = (read_attempts(folder.attempts) or [first_attempt(job)])[-1]
    attempt = _attempt(last, found.newest, wish, accepted)
    if found.newest is not None:
        _refuse_the_past(folder, last, attempt, found.newest.step)
        checkpoints.refuse_full_disk(
            folder.path, 2 * found.newest.size_bytes, "one more checkpoint and the adapter"
        )
    return Resumption(attempt=attempt, checkpoint=found.newest, broken=found.broken, fingerprint=current)


def _accepted(
    folder: RunFolder, current: Fingerprint, wish: ResumeWish, *, trained: bool
) -> list[Difference]:
    """What is not as it was, all of it accepted.

    Raises:
        InputError: some of it is not.
    """
    before = fingerprint.read(folder)
    if before is not None:
        found = fingerprint.differences(before, current)
    else:
        found = [Difference(kind=kind, text=NO_FINGERPRINT) for kind in fingerprint.KINDS if trained]
    job = [one.text for one in found if one.kind == "job"]
    if job:
        raise InputError(
            f"{folder.job} has been changed: {'; '.join(job)}; a resumption can change nothing but "
            "--epochs and --max-steps"
        )
    refused = [one for one in found if one.kind not in wish.accepted]
    if refused:
        texts = list(dict.fromkeys(one.text for one in refused))
        kinds = list(dict.fromkeys(one.kind for one in (*refused, *found)))
        raise InputError(
            f"{folder.path}: not what the run was started on: {'; '.join(texts)}; "
            f"--accept-changes {','.join(kinds)} goes on all the same"
        )
    return found


def _attempt(
    last: Attempt, newest: Checkpoint | None, wish: ResumeWish, accepted: list[Difference]
) -> Attempt:
    epochs = last.num_train_epochs if wish.num_train_epochs is None else wish.num_train_epochs
    # Steps override epochs: who asks for epochs alone wants no steps.
    kept = last.max_steps if wish.num_train_epochs is None else None
    steps = kept if wish.max_steps is None else wish.max_steps
    changes = [one.text for one in accepted]
    setup = shared_by(last.setup, wish.num_processes, wish.distributed)
    if setup != last.setup:
        changes.append(f"{ways(last.setup)} before, {ways(setup)} now")
    if epochs != last.num_train_epochs:
        changes.append(f"epochs {last.num_train_epochs:g} before, {epochs:g} now")
    if steps != last.max_steps:
        changes.append(f"max steps {last.max_steps or 'none'} before, {steps or 'none'} now")
    return dataclasses.replace(
        last,
        number=last.number + 1,
        reason="resume",
        from_step=0 if newest is None else newest.step,
        setup=setup,
        num_train_epochs=epochs,
        max_steps=steps,
        changes="; ".join(changes),
    )


def shared_by(setup: TrainingSetup, num_processes: int | None, distributed: str | None) -> TrainingSetup:
    """The setup on another number of processes, with as many sequences to an optimizer step as before.

    Raises:
        InputError: they cannot be shared evenly, or the setup cannot be sharded.
    """
    count = setup.num_processes if num_processes is None else num_processes
    way = (distributed or setup.distributed or "ddp") if count > 1 else distributed
    if count != setup.num_processes and setup.train_sampling_strategy == "group_by_length":
        raise InputError(
            f"--num-processes {count}: batches grouped by length are drawn in another order by another "
            f"number of processes, so that examples would be missed; go on with {setup.num_processes}"
        )
    one_micro_step = setup.per_device_train_batch_size * count
    if setup.effective_batch_size % one_micro_step:
        raise InputError(
            f"--num-processes {count}: an effective batch of {setup.effective_batch_size} cannot be shared "
            f"by them in micro-batches of {setup.per_device_train_batch_size}"
        )
    found = dataclasses.replace(
        setup,
        num_processes=count,
        distributed=way,
        gradient_accumulation_steps=setup.effective_batch_size // one_micro_step,
    )
    if found.distributed == "fsdp":
        refuse_unsharded(found)
    return found


def ways(setup: TrainingSetup) -> str:
    """How many processes share the work, and how, in words."""
    if setup.num_processes == 1:
        return "1 process"
    return f"{setup.num_processes} processes ({setup.distributed})"


def _refuse_the_past(folder: RunFolder, last: Attempt, attempt: Attempt, step: int) -> None:
    """See that the checkpoint does not hold more steps than are asked for.

    Raises:
        InputError: it does.
    """
    wanted = attempt.max_steps
    starts = [event for event in read_events(folder.events) if isinstance(event, StartEvent)]
    if wanted is None and last.max_steps is None and starts:
        wanted = round(starts[-1].total_steps * attempt.num_train_epochs / last.num_train_epochs)
    if wanted is not None and wanted < step:
        raise InputError(f"{folder.path}: {wanted:,} steps are asked for, and the checkpoint holds {step:,}")
