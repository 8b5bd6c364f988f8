"""A tracker is handed what the trainer logs; whatever it raises ends it and not the run."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl")
from transformers import TrainerCallback

from launcher.runs.trackers import TRACKERS
from launcher.training.tracking import CALLBACKS, Tracked


class Recorder(TrainerCallback):  # type: ignore[misc]
    def __init__(self, fails_at: str = "") -> None:
        self.seen: list[str] = []
        self.fails_at = fails_at

    def _take(self, event: str) -> None:
        self.seen.append(event)
        if event == self.fails_at:
            raise OSError("no space left on the tracker's device")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._take("begin")

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self._take(f"log {logs['loss']}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._take("end")


def told(tracked: Tracked) -> None:
    tracked.on_train_begin(None, None, None)
    for loss in (3.0, 2.0):
        tracked.on_log(None, None, None, logs={"loss": loss})
    tracked.on_train_end(None, None, None)


def test_a_tracker_is_handed_everything() -> None:
    warnings: list[str] = []
    recorder = Recorder()
    told(Tracked("wandb", lambda: recorder, warnings.append))
    assert recorder.seen == ["begin", "log 3.0", "log 2.0", "end"]
    assert warnings == []


@pytest.mark.parametrize(
    ("fails_at", "seen"), [("begin", ["begin"]), ("log 3.0", ["begin", "log 3.0"]), ("end", None)]
)
def test_a_tracker_that_fails_is_told_once_and_left_out(fails_at: str, seen: list[str] | None) -> None:
    warnings: list[str] = []
    recorder = Recorder(fails_at)
    told(Tracked("wandb", lambda: recorder, warnings.append))
    assert recorder.seen == (seen or ["begin", "log 3.0", "log 2.0", "end"])
    (warning,) = warnings
    assert warning.startswith("wandb has failed")
    assert "no space left" in warning


def test_a_tracker_that_cannot_be_made_is_left_out_too() -> None:
    warnings: list[str] = []

    def make() -> TrainerCallback:
        raise RuntimeError("requires wandb to be installed")

    told(Tracked("wandb", make, warnings.append))
    assert len(warnings) == 1


def test_an_end_that_somebody_asked_for_is_not_the_trackers() -> None:
    def interrupted() -> TrainerCallback:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tracked("wandb", interrupted, print).on_train_begin(None, None, None)


def test_each_tracker_has_transformers_own_callback() -> None:
    assert CALLBACKS.keys() == TRACKERS.keys()
