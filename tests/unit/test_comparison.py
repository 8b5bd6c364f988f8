from __future__ import annotations

import io

import pytest

from planner.commands.program import progress
from planner.gpus.target import resolve_gpu
from planner.planning import comparison
from planner.setup.training_setup import TrainingSetup


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
