"""Several cards on the sizing screen: which way is sized, and what the others come to; this machine's own."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.tui import cards, starting
from launcher.tui.advice import automatic_choice, opening_choice
from launcher.tui.cards import card_from_text
from launcher.tui.command_line import flags, plan_command, request_of
from launcher.tui.knobs import to_texts
from launcher.tui.sizing import Verdict, size_up
from launcher.tui.starting import refuse_what_cannot_start
from launcher.tui.widgets.sizing.speed_panel import speed
from planner.base.errors import InputError
from planner.base.units import MIB
from planner.models.catalog import load_shipped
from planner.planning.make_plan import make_plan
from planner.setup.training_setup import TrainingSetup
from tests.unit.test_gpu_hardware import FakeNvml, use

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


def own(name: str, number: int, used: int) -> dict[str, Any]:
    facts = {"uuid": f"GPU-{number}", "total": 24564, "reserved": 500, "display": 0, "processes": []}
    return facts | {"name": f"NVIDIA GeForce RTX {name}", "used": used}


def machine(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    use(monkeypatch, FakeNvml(*gpus))


def test_all_gpus_of_this_machine_are_offered_and_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, own("4090", 0, 3000), own("3090", 1, 0), own("4090", 2, 1000))
    offered = cards.offered()
    assert [card.title for card in offered[:4]] == [
        "all 2 GPUs here: NVIDIA GeForce RTX 4090",
        "GPU 0 here: NVIDIA GeForce RTX 4090",
        "GPU 1 here: NVIDIA GeForce RTX 3090",
        "GPU 2 here: NVIDIA GeForce RTX 4090",
    ]
    assert {card.group for card in offered[:4]} == {cards.DETECTED}
    assert offered[4].group == cards.SIZE
    # As `plan` without --gpu: the one with most memory free, with all of its kind.
    assert cards.first_card(None, "16GB").title == "GPU 1 here: NVIDIA GeForce RTX 3090"
    machine(monkeypatch, own("4090", 0, 3000), own("4090", 1, 1000))
    assert cards.first_card(None, "16GB").title == "all 2 GPUs here: NVIDIA GeForce RTX 4090"
    machine(monkeypatch, own("4090", 0, 3000))
    assert [card.title for card in cards.detected_cards()] == ["GPU 0 here: NVIDIA GeForce RTX 4090"]


def test_the_fullest_of_all_decides_and_one_alone_is_sized_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, own("4090", 0, 3000), own("4090", 1, 1000))
    both, first, second = cards.detected_cards()
    found = size_up(setup(LARGE.id), LARGE, both)
    assert found.setup.num_processes == 2
    assert found.card.usable_bytes == (24564 - 500 - 3000) * MIB
    alone = size_up(setup(SMALL.id), SMALL, second)
    assert (alone.setup.num_processes, alone.ways) == (1, ())
    assert alone.card.usable_bytes == (24564 - 500 - 1000) * MIB
    # The command line sees the same.
    command = plan_command(found)
    assert command.startswith("vramwise plan ")
    assert "--num-processes 2 --distributed fsdp" in command
    assert plan_command(alone).startswith("CUDA_VISIBLE_DEVICES=1 vramwise plan ")
    plan = make_plan(request_of(found), model=LARGE, target=found.card.target, whole=False)
    assert plan.gpu.usable_bytes == found.card.usable_bytes
    assert plan.gpu.first_position(2) == 0
    starts_on = size_up(setup(SMALL.id), SMALL, second).card.target.first_position(1)
    assert starts_on == 1
    assert first.environment == "CUDA_VISIBLE_DEVICES=0"


def test_a_run_on_all_of_them_looks_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, own("4090", 0, 0), own("4090", 1, 20000))
    assert starting.first_in_the_way(range(2), 20000 * MIB) is not None
    assert "on GPU 1" in str(starting.first_in_the_way(range(2), 20000 * MIB))
    assert starting.first_in_the_way(range(1), 20000 * MIB) is None
    sized = size_up(setup(SMALL.id), SMALL, card_from_text("3x24GB"))
    with pytest.raises(InputError, match="3 GPUs are sized, and this machine has 2"):
        refuse_what_cannot_start(sized)
