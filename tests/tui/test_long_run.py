"""A run with a long past: opened from what is rare and some of what is many, and no event uncounted."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from launcher.runs import tail
from launcher.runs.events import CheckpointEvent, EvalEvent, to_line
from launcher.runs.folder import RunFolder
from launcher.tui.run_follower import RunFollower
from launcher.tui.widgets.run.log_lines import broken

from . import synthetic

STEPS = 8_000


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of many steps, five checkpoints, and evaluations of which one in the middle is best."""
    folder = synthetic.make_folder(tmp_path_factory.mktemp("long") / "run")
    with folder.events.open("w") as file:
        file.write(to_line(synthetic.start(STEPS)))
        for step in range(1, STEPS + 1):
            file.write(to_line(synthetic.log(step, loss=3.0 - 2.0 * step / STEPS)))
            if step % 1600 == 0:
                file.write(to_line(CheckpointEvent(time=synthetic.START, step=step, path=f"/c/{step}")))
            if step % 711 == 0:
                loss = 0.5 if step == 7 * 711 else 1.0
                file.write(to_line(EvalEvent(time=synthetic.START, step=step, loss=loss)))
        file.write(to_line(synthetic.end("finished", STEPS)))
    return folder


def test_what_is_many_is_thinned_and_what_is_rare_is_all_there(
    long_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = RunFollower(long_run)
    follower._events.tail.slice_bytes = 2**24
    whole = follower.poll()
    assert not whole.behind
    assert whole.event_count == STEPS + 5 + 11 + 2
    read = []
    monkeypatch.setattr(tail, "LONG_BYTES", 2**18)
    monkeypatch.setattr(tail, "WHOLE_BYTES", 2**15)
    monkeypatch.setattr(tail, "KEPT_LINES", 600)
    monkeypatch.setattr("launcher.tui.run_follower.from_line", lambda line: read.append(line) or _read(line))
    follower = RunFollower(long_run)
    follower._events.tail.slice_bytes = 2**17
    snapshot = follower.poll()
    # In one look, of which few lines are read.
    assert snapshot.over
    assert len(read) < STEPS / 5
    for fact in ("state", "step", "total_steps", "event_count", "first_loss", "best_evaluation", "log"):
        assert getattr(snapshot, fact) == getattr(whole, fact), fact
    assert snapshot.checkpoint == whole.checkpoint
    assert snapshot.curves.eval_losses == whole.curves.eval_losses
    assert snapshot.lines[-100:] == whole.lines[-100:]
    assert snapshot.tokens_per_second == pytest.approx(whole.tokens_per_second, rel=0.01)
    assert len(snapshot.losses) > 300
    assert all(math.isclose(loss, 3.0 - 2.0 * step / STEPS, abs_tol=0.03) for step, loss in snapshot.losses)
    assert statistics.fmean(y for _, y in snapshot.losses) == pytest.approx(2.0, abs=0.03)
    # What comes after is read whole, and a file that is another is read anew.
    read.clear()
    synthetic.append(long_run.events, *(synthetic.log(STEPS + step) for step in range(1, 301)))
    snapshot = follower.poll()
    assert (len(read), snapshot.step, snapshot.event_count) == (300, STEPS + 300, whole.event_count + 300)
    long_run.events.unlink()
    synthetic.append(long_run.events, synthetic.start(5), synthetic.log(1))
    assert follower.poll().event_count == 2


def _read(line: bytes) -> object:
    from launcher.runs.events import from_line

    return from_line(line)


def test_the_advice_of_a_long_run_that_has_a_report_is_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = synthetic.make_folder(tmp_path / "run")
    # Of all these losses the rules would say that they have not moved.
    synthetic.append(
        folder.events, synthetic.start(3000), *(synthetic.log(step, loss=2.0) for step in range(1, 3000))
    )
    monkeypatch.setattr(tail, "LONG_BYTES", 2**16)
    monkeypatch.setattr(tail, "WHOLE_BYTES", 2**13)
    monkeypatch.setattr(tail, "KEPT_LINES", 100)

    def followed() -> tuple[str, ...]:
        follower = RunFollower(folder)
        follower._events.tail.slice_bytes = 2**16
        return follower.poll().warnings

    (told,) = followed()
    assert "the loss has not moved" in told
    folder.report.write_text(json.dumps({"advice": ["the report says so"]}))
    assert followed() == ("the report says so",)
    folder.report.write_text("[]")
    assert followed() == (told,)


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ((("", ""),), [""]),
        ((("abc", "red"),), ["abc"]),
        ((("abcde", "red"), ("fg", "blue")), ["abcd", "efg"]),
        ((("ab", "red"), ("cdefghij", "blue")), ["abcd", "efgh", "ij"]),
        # Two cells each, of which no half is drawn.
        ((("日本語", ""),), ["日本", "語"]),
        ((("a日本", ""),), ["a日", "本"]),
    ],
)
def test_long_lines_of_the_log_are_broken_at_the_width(line: tuple, rows: list[str]) -> None:
    assert ["".join(text for text, _ in row) for row in broken(line, 4)] == rows
