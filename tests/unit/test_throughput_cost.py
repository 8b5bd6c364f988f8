from __future__ import annotations

import math

import pytest

from planner.base.errors import FieldError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.price import Cost, hours_for, run_cost


def test_tokens_become_hours_and_hours_a_price() -> None:
    hours = hours_for(36e6, 5_000)
    assert hours == 2.0
    h100 = gpu_catalog().get("h100")
    cost = run_cost(hours, h100, gpu_count=2)
    assert cost is not None
    assert cost.usd == pytest.approx(4 * (h100.price_usd_per_hour or math.nan))
    given = run_cost(hours, h100, usd_per_gpu_hour=0.5)
    assert given == Cost(hours=2.0, gpu_count=1, usd_per_gpu_hour=0.5)
    assert given.usd == 1.0


def test_an_unknown_price_gives_no_cost() -> None:
    assert run_cost(1.0, gpu_catalog().get("rtx-3070")) is None


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf, 1e9, True])
def test_a_price_that_cannot_be_is_refused(price: float) -> None:
    with pytest.raises(FieldError, match="price"):
        run_cost(1.0, gpu_catalog().get("h100"), usd_per_gpu_hour=price)


@pytest.mark.parametrize(("tokens", "speed"), [(1e6, 0.0), (1e6, -1.0), (-1.0, 10.0), (math.nan, 10.0)])
def test_hours_need_a_rate(tokens: float, speed: float) -> None:
    with pytest.raises(FieldError):
        hours_for(tokens, speed)
