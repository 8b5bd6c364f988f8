from __future__ import annotations

import pytest

from planner.gpus.target import resolve_gpu
from planner.planning import comparison
from planner.setup.training_setup import TrainingSetup


def test_models_shared_out_among_processes_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        one for one in comparison.list_models() if one.id in ("qwen2.5-14b", "smollm2-135m", "llama-3.1-70b")
    ]
    monkeypatch.setattr(comparison, "list_models", lambda: some)
    target, base = resolve_gpu("16GB"), TrainingSetup(model="any", max_length=512)
    alone = comparison.longest_lengths(target, base, fixed={})
    assert [one.model for one in alone] == ["qwen2.5-14b", "smollm2-135m"]
    assert comparison.longest_lengths(target, base, fixed={}, processes=2) == alone
