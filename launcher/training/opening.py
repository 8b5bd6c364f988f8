"""How an attempt begins in the process that trains it, or that has another trainer do so. Light: no torch."""

from __future__ import annotations

import os
import time

from launcher.runs import trackers
from launcher.runs.attempts import Attempt, add_attempt, first_attempt, read_attempts
from launcher.runs.events import AttemptEvent, EventWriter, read_events
from launcher.runs.folder import RunBusyError, RunFolder
from launcher.runs.training_job import TrainingJob
from launcher.training.several.ranks import ALONE, Ranks


def refuse_started(folder: RunFolder) -> None:
    """See that there is an attempt that no trainer has begun, or that nothing has begun at all.

    Raises:
        RunBusyError: there is none.
        InputError: the attempts cannot be read.
    """
    attempts, events = read_attempts(folder.attempts), read_events(folder.events)
    begun = max((event.number for event in events if isinstance(event, AttemptEvent)), default=0)
    if (events and not attempts) or (attempts and attempts[-1].number <= begun):
        raise RunBusyError(f"{folder.path}: this run has been started before; `vramwise runs resume` goes on")


def begin_attempt(
    folder: RunFolder, writer: EventWriter, ranks: Ranks = ALONE
) -> tuple[TrainingJob, Attempt]:
    """The last attempt, told as an event, and the job as it trains it.

    Raises:
        InputError: job or attempts cannot be read.
    """
    job, attempts = folder.read_job(), read_attempts(folder.attempts)
    attempt = attempts[-1] if attempts else first_attempt(job)
    if not attempts and ranks.tells:
        add_attempt(folder.attempts, attempt)
    writer.write(
        AttemptEvent(
            time=time.time(),
            number=attempt.number,
            reason=attempt.reason,
            from_step=attempt.from_step,
            changes=attempt.changes,
        )
    )
    return attempt.apply(job), attempt


def set_environment(job: TrainingJob, folder: RunFolder) -> None:
    """What libraries read at import: no network unless asked, no telemetry, no forked tokenizer threads."""
    trackers.prepare(job.track, folder.tracking, allow_upload=job.allow_upload)
    if not job.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
