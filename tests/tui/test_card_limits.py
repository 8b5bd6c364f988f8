"""The interface refuses what `plan` and `estimate` refuse on a card."""

from __future__ import annotations

import pytest

from launcher.tui.cards import card_from_text
from launcher.tui.sizing import size_up
from planner.base.errors import InputError
from planner.models.catalog import load_shipped
from planner.planning.estimation import estimate
from planner.setup.training_setup import TrainingSetup


def test_a_knob_that_the_card_cannot_run_is_refused_as_estimate_refuses_it() -> None:
    setup = TrainingSetup(
        model="llama-3.2-1b", max_length=1024, dtype="float16", attn_implementation="flash_attention_2"
    )
    with pytest.raises(InputError) as told:
        estimate(setup, gpu="t4")
    with pytest.raises(InputError) as shown:
        size_up(setup, load_shipped("llama-3.2-1b"), card_from_text("t4"))
    assert str(shown.value) == str(told.value)
