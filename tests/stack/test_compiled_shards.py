"""Layers compiled under FSDP2: two ranks learn what they learn uncompiled, and keep what the plan counts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("bitsandbytes")

from planner.memory.compiled.kept import kept_names, kept_sizes
from planner.memory.decoder.groups import layer_groups
from planner.setup.run import TrainingRun
from tests.stack import local_ranks
from tests.stack.compiled_ranks import CASES, LENGTH, measured_rank, setup_of
from tests.stack.small_models import LAYERS, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of losses after an update: compiled layers round in other places."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return local_ranks.measured(measured_rank, tmp_path_factory.mktemp("compiled"), seconds=800)


@pytest.mark.parametrize("case", CASES)
def test_compiled_layers_learn_what_uncompiled_ones_do(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        eager, compiled = rank[case]["eager"], rank[case]["compiled"]
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=ROUNDING[setup_of(case).dtype])
        # The layers share one graph, which nothing breaks.
        assert (eager["graphs"], compiled["graphs"], compiled["breaks"]) == (0, 1, 0)


@pytest.mark.parametrize("case", CASES)
def test_compiled_layers_keep_what_the_plan_counts(ranks: list[dict[str, Any]], case: str) -> None:
    parts, _ = layer_groups(TrainingRun(setup=setup_of(case), model=spec_of("llama")))
    part = next(part for part in parts if 1 in part.indices)
    names = kept_names(part.layer, part.knobs, input_requires_grad=True) - {"x"}
    sizes = kept_sizes(part.layer, part.knobs)
    for rank in ranks:
        assert rank[case]["compiled"]["kept"] == [LENGTH * sum(sizes[name] for name in names)] * LAYERS
