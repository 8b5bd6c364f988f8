"""`--wait` of `train` and `runs resume`: a GPU that another run has, or whose memory others hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.commands.program import say

if TYPE_CHECKING:
    from launcher.runs.attempts import Attempt
    from launcher.runs.folder import RunFolder
    from planner.answers.plan import Plan
    from planner.setup.request import PlanRequest


def see_that_the_gpu_is_free(request: PlanRequest, *, wait: bool, nnodes: int = 1) -> None:
    """Before planning, which counts what others hold of the GPU; `nnodes` machines share the processes.

    Raises:
        GpuBusyError: another run trains on it, and nobody wants to wait.
    """
    from planner.gpus.target import resolve_gpu

    count = request.fixed.get("num_processes")
    count = max(1, count // nnodes) if isinstance(count, int) else 1
    first = resolve_gpu(request.gpu, display=request.display).first_position(count)
    for position in range(first, first + count):
        _see_that_nobody_trains(position, wait=wait)


def its_gpus_were_waited_for(plan: Plan, *, wait: bool, nnodes: int = 1) -> bool:
    """After planning, which may have chosen several GPUs; whether one was waited for.

    Raises:
        GpuBusyError: another run trains on one of them, and nobody wants to wait.
    """
    # Each of them, not the first that was waited for.
    waited = [_see_that_nobody_trains(position, wait=wait) for position in _positions(plan, nnodes)]
    return any(waited)


def is_full(plan: Plan, *, nnodes: int = 1) -> bool:
    """Whether others hold so much of the GPU that the plan has no room, which is said."""
    from launcher.runs.minding.gpu_room import lasting_shortage

    for position in _positions(plan, nnodes):
        lacking = lasting_shortage(position, plan.memory.peak_upper_bytes)
        if lacking is not None:
            say(f"{lacking}; --wait waits until it is free")
            return True
    return False


def waited_for_room(plan: Plan, *, nnodes: int = 1) -> bool:
    """Wait until the GPU has room for the plan; whether that took time, in which all may have changed."""
    # Each of them, not the first that was waited for.
    waited = [_waited(position, plan.memory.peak_upper_bytes) for position in _positions(plan, nnodes)]
    return any(waited)


def _positions(plan: Plan, nnodes: int) -> range:
    """The GPUs of this machine that the plan takes, a process each."""
    count = max(1, plan.setup.num_processes // nnodes)
    first = plan.gpu.first_position(count)
    return range(first, first + count)


def see_that_a_run_can_go_on(folder: RunFolder, attempt: Attempt, *, wait: bool) -> bool:
    """Before a run goes on; whether it was waited for.

    Raises:
        GpuBusyError: another run trains on its GPU, and nobody wants to wait.
        GpuFullError: others hold so much of it that the run has no room, and nobody wants to wait.
        GpuTooSmallError: shared otherwise than before, it would not fit on the empty GPU either.
    """
    from launcher.runs.attempts import first_attempt, read_attempts
    from launcher.runs.kept.resumption import ways
    from launcher.runs.minding.gpu_room import refuse_full_gpu, refuse_small_gpu

    job = folder.read_job()
    last = (read_attempts(folder.attempts) or [first_attempt(job)])[-1]
    job, need = attempt.apply(job), _need_of(folder, attempt)
    positions = range(job.gpu_index, job.gpu_index + job.local_processes)
    if need is not None and attempt.setup != last.setup:
        # Before the wait, which would be in vain. A setup that has trained is not asked again.
        what = f"{folder.path.name}: with {ways(attempt.setup)} the run"
        for position in positions:
            refuse_small_gpu(position, need, what)
    busy = [_see_that_nobody_trains(position, wait=wait) for position in positions]
    waited = any(busy)
    for position in positions:
        if need is None:
            break
        if wait:
            waited = _waited(position, need) or waited
        else:
            refuse_full_gpu(position, need)
    return waited


def _see_that_nobody_trains(position: int, *, wait: bool) -> bool:
    """Whether it was waited for."""
    from launcher.runs.minding import gpu_lock

    uuid = gpu_lock.gpu_at(position)
    if uuid is None or gpu_lock.who_holds(uuid) is None:
        return False
    if not wait:
        gpu_lock.refuse_busy_gpu(uuid)
    gpu_lock.wait_for_gpu(uuid, say)
    return True


def _waited(position: int, need_bytes: int) -> bool:
    from launcher.runs.minding.gpu_room import shortage, wait_for_room

    if shortage(position, need_bytes) is None:
        return False
    wait_for_room(position, need_bytes, say)
    return True


def _need_of(folder: RunFolder, attempt: Attempt) -> int | None:
    """What an attempt needs of the GPU by the run's plan; None for a job made by hand, or a damaged plan."""
    from launcher.runs.minding.smaller import model_of
    from launcher.runs.report.facts import plan_or_none
    from planner.search.evaluator import Evaluator

    plan = plan_or_none(folder)
    if plan is None or attempt.setup == plan.setup:
        return None if plan is None else plan.memory.peak_upper_bytes
    # It was made smaller when memory ran out.
    evaluator = Evaluator(model_of(folder, plan), plan.gpu.spec, plan.gpu.usable_bytes)
    return evaluator.confirm(attempt.setup, whole=True).peak_upper_bytes
