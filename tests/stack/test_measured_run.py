"""The clock of a measuring run: which steps count, and when there are enough of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.measuring import measured_run
from launcher.measuring.measured_run import MOST_STEPS, WARM_UP_STEPS, MeasuredRun, most_steps
from launcher.measuring.profile import Profile
from tests.stack.test_build import make_setup, make_trainer

pytestmark = pytest.mark.slow

SLOW_SECONDS, NEVER_SECONDS = 0.0, 1e9


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)


def trained(folder: Path, *, asked: int) -> MeasuredRun:
    setup = make_setup(max_length=64, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    profile = Profile(setup=setup, steps=asked)
    run = MeasuredRun(profile, torch.device("cpu"), None)
    trainer = make_trainer(setup, folder, max_steps=WARM_UP_STEPS + most_steps(profile))
    trainer.add_callback(run._step_clock())
    trainer.train()
    return run


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(("enough", "steady"), [(SLOW_SECONDS, 2), (NEVER_SECONDS, MOST_STEPS)])
def test_short_steps_are_repeated_until_they_took_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: float, steady: int
) -> None:
    monkeypatch.setattr(measured_run, "STEADY_SECONDS", enough)
    run = trained(tmp_path, asked=2)
    assert len(run.step_seconds) == len(run.update_seconds) == WARM_UP_STEPS + steady
    assert run.micro_steps == [2] * (WARM_UP_STEPS + steady)
    assert all(0 < u < s for u, s in zip(run.update_seconds, run.step_seconds, strict=True))
    mean = sum(run.step_seconds[WARM_UP_STEPS:]) / steady
    assert run.tokens_per_second == pytest.approx(2 * 64 / mean)
