"""Several cards on the sizing screen: which way is sized, and what the others come to."""

from __future__ import annotations

import pytest

from launcher.tui.advice import automatic_choice, opening_choice
from launcher.tui.cards import card_from_text
from launcher.tui.command_line import flags
from launcher.tui.knobs import to_texts
from launcher.tui.sizing import Verdict, size_up
from launcher.tui.starting import refuse_what_cannot_start
from launcher.tui.widgets.sizing.speed_panel import speed
from planner.base.errors import InputError
from planner.models.catalog import load_shipped
from planner.setup.training_setup import TrainingSetup

TWO = card_from_text("2x24GB")
LARGE = load_shipped("llama-3.1-70b")
SMALL = load_shipped("llama-3.1-8b")


def setup(model: str) -> TrainingSetup:
    return TrainingSetup(model=model, max_length=512, optim="adamw_8bit")


def test_a_model_that_one_card_cannot_hold_is_sized_by_fsdp() -> None:
    found = size_up(setup(LARGE.id), LARGE, TWO)
    assert (found.setup.distributed, found.setup.optim) == ("fsdp", "adamw_torch_fused")
    assert found.verdict is not Verdict.DOES_NOT_FIT
    assert [way.split(" lacks")[0] for way in found.ways] == ["one GPU alone", "DDP"]
    told = speed(found, muted="", warning="").plain
    assert "FSDP2 on 2 GPUs" in told
    assert "one GPU alone lacks" in told
    assert "--distributed" in flags(found)
    with pytest.raises(InputError, match="2 GPUs are sized"):
        refuse_what_cannot_start(found)


def test_a_model_that_fits_each_is_sized_by_what_is_faster() -> None:
    found = size_up(setup(SMALL.id), SMALL, TWO)
    assert found.setup.num_processes == 2
    assert len(found.ways) == 2
    assert all("tokens/s" in way for way in found.ways)
    assert size_up(setup(SMALL.id), SMALL, card_from_text("24GB")).ways == ()


def test_the_automatic_choice_and_the_opening_go_by_all_cards() -> None:
    chosen = automatic_choice(LARGE.id, LARGE, TWO, to_texts(setup(LARGE.id)))
    assert chosen.setup.distributed == "fsdp"
    assert opening_choice(SMALL.id, SMALL, TWO).num_processes == 2
