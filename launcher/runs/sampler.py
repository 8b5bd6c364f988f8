"""`python -m launcher.runs.sampler RUN_DIR`: the process that writes samples.jsonl until the trainer is gone.

A process of its own, since a lost GPU has crashed processes that held NVML, and none of that may reach the
trainer or a watcher. Without a GPU it samples the trainer's resident memory.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from launcher.runs.attempts import read_attempts
from launcher.runs.events import EventWriter, SampleEvent, iter_events
from launcher.runs.folder import RunBusyError, RunFolder, anchored, hold_lock
from launcher.runs.locks import is_alive, live_pid
from launcher.runs.report.writing import write_or_say
from planner.base.errors import ExitCode, InputError

SAMPLE_SECONDS = 1.0

Sampler = Callable[[int], SampleEvent]


def main(arguments: list[str]) -> int:
    """Sample the run of the folder named; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.runs.sampler RUN_DIR", file=sys.stderr)
        return ExitCode.BAD_INPUT
    try:
        with (
            # The folder may be renamed while the run goes on.
            anchored(RunFolder(Path(arguments[0]).resolve())) as folder,
            hold_lock(folder, "sampler"),
            EventWriter(folder.samples) as writer,
        ):
            job, attempts = folder.read_job(), read_attempts(folder.attempts)
            job = attempts[-1].apply(job) if attempts else job
            sample = _choose_sampler(job.gpu_index, job.local_processes, _used_before(folder))
            over = False
            while not over:
                while is_alive(folder):
                    # Between two attempts there is a keeper and no trainer.
                    if (pid := live_pid(folder, "trainer")) is not None:
                        writer.write(sample(pid))
                    time.sleep(SAMPLE_SECONDS)
                # Where there is a keeper it ends this process, and writes the report.
                write_or_say(RunFolder(folder.shown))
                # Resumed meanwhile, it has no other sampler: this one holds the lock.
                over = not is_alive(folder)
    except (RunBusyError, InputError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return ExitCode.OK


def _used_before(folder: RunFolder) -> int | None:
    """What was in use on the GPU before this trainer took any, as a sampler that died has found it; None if
    there was none.
    """
    try:
        began = folder.lock_file("trainer").stat().st_mtime
    except OSError:
        return None
    for event in iter_events(folder.samples):
        if isinstance(event, SampleEvent) and event.used_bytes is not None and event.time >= began:
            return event.used_bytes - (event.process_bytes or 0)
    return None


def _choose_sampler(gpu_index: int, count: int, used_before_bytes: int | None) -> Sampler:
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        gpus = local_gpus()[gpu_index : gpu_index + count]
    except NoGpuError:
        return sample_resident_memory
    if not gpus:
        return sample_resident_memory
    # What was used before by others is known of one GPU alone where a sampler takes another's place.
    known = used_before_bytes if count == 1 else None
    before = [(gpu.uuid, gpu.used_bytes if known is None else known) for gpu in gpus]
    if count == 1:
        return lambda pid: sample_gpu(*before[0], pid)
    return lambda pid: sample_gpus(before, pid)


def sample_gpus(gpus: Sequence[tuple[str, int]], pid: int) -> SampleEvent:
    """The GPU of several that is used most, and some figures of each. The driver's list names other ranks
    than `pid` for all but the first, so that what the run takes of one is told by difference.
    """
    samples = [sample_gpu(uuid, before, pid) for uuid, before in gpus]
    most = max(samples, key=lambda sample: sample.used_bytes or 0)
    each = {
        str(rank): [sample.used_bytes, sample.process_bytes, sample.utilization_percent]
        for rank, sample in enumerate(samples)
    }
    return dataclasses.replace(most, gpus=each)


def sample_resident_memory(pid: int) -> SampleEvent:
    """Host memory: the trainer's resident bytes, and the machine's used and total bytes as null."""
    try:
        resident = int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        resident = None
    return SampleEvent(
        time=time.time(),
        used_bytes=None,
        total_bytes=None,
        process_bytes=resident,
        host_percent=host_percent(pid),
    )


_PROCESSES: dict[int, psutil.Process] = {}


def host_percent(pid: int) -> float | None:
    """How much of one core a process took since this was last asked; None at first, and when it is gone."""
    try:
        if pid not in _PROCESSES:
            _PROCESSES[pid] = psutil.Process(pid)
            _PROCESSES[pid].cpu_percent()
            return None
        return float(_PROCESSES[pid].cpu_percent())
    except psutil.NoSuchProcess:
        return None


def sample_gpu(uuid: str, used_before: int, pid: int) -> SampleEvent:
    """The run's GPU; `process_bytes` from the driver's list if it names the trainer, else by difference."""
    from planner.gpus.detect import GpuLoad, NoGpuError, gpu_load, local_gpus

    load = GpuLoad()
    try:
        gpu = next((gpu for gpu in local_gpus() if gpu.uuid == uuid), None)
        load = gpu_load(uuid)
    except NoGpuError:
        gpu = None
    if gpu is None:
        return SampleEvent(time=time.time(), used_bytes=None, total_bytes=None, process_bytes=None)
    listed = next((process.used_bytes for process in gpu.processes if process.pid == pid), None)
    return SampleEvent(
        time=time.time(),
        used_bytes=gpu.used_bytes,
        total_bytes=gpu.spec.memory_bytes,
        process_bytes=max(0, gpu.used_bytes - used_before) if listed is None else listed,
        utilization_percent=load.utilization_percent,
        temperature_c=load.temperature_c,
        power_w=load.power_w,
        host_percent=host_percent(pid),
        slowed_by=load.slowed_by,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
