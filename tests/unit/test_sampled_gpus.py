"""Which GPUs the sampler looks at: those of the attempt that trains, not of the job that was asked first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

from launcher.runs import sampler
from launcher.runs.attempts import add_attempt, first_attempt
from launcher.runs.events import SampleEvent, iter_events
from launcher.runs.folder import create_run_folder
from launcher.runs.kept.resumption import shared_by
from launcher.runs.training_job import TrainingJob
from planner.gpus import detect
from planner.setup.training_setup import TrainingSetup

from .test_gpu_hardware import FakeNvml, h100, use

SETUP = TrainingSetup(model="m", max_length=64, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("before", "index", "after", "sampled"),
    [
        (1, 1, 2, {"0": 1, "1": 2}),  # several are the first ones, wherever one was
        (2, 0, 1, {}),
        (2, 0, None, {"0": 1, "1": 2}),
    ],
    ids=["from one to two", "from two to one", "from two to two"],
)
def test_the_gpus_of_the_last_attempt_are_sampled(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    before: int,
    index: int,
    after: int | None,
    sampled: dict[str, int],
) -> None:
    """GPU n of this machine has n + 1 thousand MiB in use."""
    use(monkeypatch, FakeNvml(*(h100(number, used=1000 * (number + 1)) for number in range(3))))
    monkeypatch.setattr(detect, "gpu_load", lambda uuid: detect.GpuLoad())
    job = TrainingJob(
        setup=shared_by(SETUP, before, None), model_source="m", data_path="d.jsonl", gpu_index=index
    )
    folder = create_run_folder(tmp_path, job, name="run")
    first = first_attempt(job)
    add_attempt(folder.attempts, first)
    again = dataclasses.replace(first, number=2, reason="resume", setup=shared_by(job.setup, after, None))
    add_attempt(folder.attempts, again)
    alive = iter((True, False, False))
    monkeypatch.setattr(sampler, "is_alive", lambda folder: next(alive))
    monkeypatch.setattr(sampler, "live_pid", lambda folder, process: 7)
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 0.0)
    assert sampler.main([str(folder.path)]) == 0
    (sample,) = (event for event in iter_events(folder.samples) if isinstance(event, SampleEvent))
    thousands: dict[str, Any] = {rank: used // (1000 * 2**20) for rank, (used, *_) in sample.gpus.items()}
    assert thousands == sampled
    assert sample.used_bytes == (2 if sampled else 1) * 1000 * 2**20
