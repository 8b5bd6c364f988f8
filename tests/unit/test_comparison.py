from __future__ import annotations

import io
import json
from itertools import product

import pytest

from planner.base.data_files import PROFILES
from planner.base.json_codec import encode
from planner.cli import COMMANDS
from planner.commands.program import progress, run_command
from planner.gpus.target import resolve_gpu
from planner.planning import comparison
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup

DATA = str(PROFILES / "demo" / "data" / "train.jsonl")


def test_models_shared_out_among_processes_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        one for one in comparison.list_models() if one.id in ("qwen2.5-14b", "smollm2-135m", "llama-3.1-70b")
    ]
    monkeypatch.setattr(comparison, "list_models", lambda: some)
    target, base = resolve_gpu("16GB"), TrainingSetup(model="any", max_length=512)
    alone = comparison.largest_models(target, base, fixed={})
    assert [one.model for one in alone.models] == ["qwen2.5-14b", "smollm2-135m"]
    assert comparison.largest_models(target, base, fixed={}, processes=2) == alone
    first = comparison.largest_models(target, base, fixed={}, most=1)
    assert (first.models, first.smaller) == (alone.models[:1], 1)


def test_it_is_told_how_many_models_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [one for one in comparison.list_models() if one.id in ("smollm2-135m", "llama-3.1-70b")]
    monkeypatch.setattr(comparison, "list_models", lambda: some)
    told: list[tuple[int, int]] = []
    comparison.largest_models(
        resolve_gpu("16GB"),
        TrainingSetup(model="any", max_length=512),
        fixed={},
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_with_data_a_row_is_what_plan_says_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    models, cards = ("qwen2.5-0.5b", "smollm2-135m"), ("8GB", "rtx-4090")
    asked = ["--data", DATA, "--epochs", "2"]
    pairs = [word for name in models for word in ("--model", name)]
    pairs += [word for name in cards for word in ("--gpu", name)]
    assert run_command("compare", COMMANDS["compare"], [*pairs, *asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["model"], row["gpu"]) for row in rows] == list(product(models, cards))
    for row in rows:
        plan = make_plan(
            make_request(row["model"], gpu=row["gpu"], data=DATA, num_train_epochs=2.0), whole=False
        )
        assert row["data"] == encode(plan.data)
        assert row["duration"] == encode(plan.duration)
        assert row["peak_upper_bytes"] == plan.memory.peak_upper_bytes
        assert row["max_length"] == plan.setup.max_length
    assert run_command("compare", COMMANDS["compare"], [*pairs, *asked]) == 0
    assert "time: of 2 epochs of 320 examples of" in " ".join(capsys.readouterr().out.split())


class Screen(io.StringIO):
    """What stderr is: a terminal or not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        """As asked for."""
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [(True, "\rmodels: 0 of 2\rmodels: 1 of 2\r\x1b[K"), (False, "")],
)
def test_progress_is_a_line_of_a_terminal_that_goes_away(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: str
) -> None:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr("sys.stderr", screen)
    show = progress("models")
    for done in range(3):
        show(done, 2)
    assert screen.getvalue() == shown
