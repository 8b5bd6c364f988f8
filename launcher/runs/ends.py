"""How a run can end: each way with its state, its exit code and what it means for what was trained.

The training process, the keeper and the command line end with the same code for the same state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class RunExit(IntEnum):
    """Exit codes of a run, one for each way to end."""

    FINISHED = 0
    BUG = 1
    BAD_INPUT = 2
    OOM = 4
    DIVERGED = 5
    DISK = 6
    HANG = 7
    HARDWARE = 8
    STOPPED_SAVED = 130
    STOPPED_UNSAVED = 131
    KILLED = 137


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEndKind:
    """One way to end: `state` as EndEvent and `vramwise runs` name it, and what it means in a sentence."""

    state: str
    code: RunExit
    meaning: str


RUN_ENDS = (
    RunEndKind(state="finished", code=RunExit.FINISHED, meaning="all steps are done, the adapter is saved"),
    RunEndKind(
        state="stopped",
        code=RunExit.STOPPED_SAVED,
        meaning="ended on request after a step; a checkpoint and the adapter are saved",
    ),
    RunEndKind(
        state="interrupted",
        code=RunExit.STOPPED_UNSAVED,
        meaning="ended on request at once; what the last checkpoint does not hold is lost",
    ),
    RunEndKind(state="oom", code=RunExit.OOM, meaning="memory of the GPU or the host ran out"),
    RunEndKind(
        state="diverged",
        code=RunExit.DIVERGED,
        meaning="loss or gradient was not finite, before an update by it",
    ),
    RunEndKind(
        state="disk", code=RunExit.DISK, meaning="there was no room, or no way, to write what must be kept"
    ),
    RunEndKind(state="hang", code=RunExit.HANG, meaning="no progress within the limit, again after restarts"),
    RunEndKind(state="hardware", code=RunExit.HARDWARE, meaning="the GPU or its driver failed"),
    RunEndKind(
        state="killed", code=RunExit.KILLED, meaning="the trainer was ended from outside, without a word"
    ),
    RunEndKind(
        state="refused", code=RunExit.BAD_INPUT, meaning="the job, the model or the data cannot be trained"
    ),
    RunEndKind(
        state="failed", code=RunExit.BUG, meaning="an error that nobody foresaw; its traceback is in the log"
    ),
)
END_STATES = tuple(end.state for end in RUN_ENDS)
_CODES = {end.state: end.code for end in RUN_ENDS}


def exit_code(state: str) -> RunExit:
    """The exit code of an end state; of a state that this version does not know, that of a bug."""
    return _CODES.get(state, RunExit.BUG)
