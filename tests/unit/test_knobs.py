"""KNOBS says all that is known of a knob once: whatever shows, checks or counts knobs reads it there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from launcher.tui import knobs as form
from planner.base.errors import FieldError, InputError
from planner.commands.knobs import add_knobs, given_knobs
from planner.commands.program import Parser
from planner.memory.measured.coverage import knob_counter, together
from planner.models.catalog import load_shipped
from planner.setup.checks import setup_check
from planner.setup.knob import METHODS, Counted, Form, Knob, Line, Need
from planner.setup.knobs import KNOBS
from planner.setup.methods import refused_by, with_method
from planner.setup.options import differences
from planner.setup.request import KNOB_NAMES, planned
from planner.setup.run import TrainingRun
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup
from planner.text.plan import knob_lines
from tests.write_docs import knobs_page

MADE_UP = Knob(
    name="warp_drive",
    kind="choice",
    section="layers",
    help="how layers are folded",
    default="off",
    choices=("off", "impulse", "maximum"),
    methods=("qlora", "lora"),
    needs=(Need(other="packing", other_than=True, told="packing false"),),
    unset="{default}",
    counted=Counted(together=True),
    form=Form(place=2, label="warp", help="warp_drive: how layers are folded"),
    line=Line(place=0, label="warp drive"),
)
MORE = (*KNOBS, MADE_UP)
MODEL = load_shipped("llama-3.1-8b")
FIELD_TYPES = {
    "choice": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "names": "str | tuple[str, ...]",
    "indices": "tuple[int, ...]",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Warped(TrainingSetup):
    warp_drive: str = "off"


def warped(**values: Any) -> Warped:
    return Warped(model=MODEL.id, max_length=512, **values)


def test_every_field_but_the_model_has_exactly_one_row_in_the_contracts_order() -> None:
    assert tuple(knob.name for knob in KNOBS) == tuple(name for name in FIELD_NAMES if name != "model")
    assert tuple(knob.name for knob in KNOBS) == KNOB_NAMES


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_a_field_has_the_type_and_the_default_of_its_row(knob: Knob) -> None:
    field = next(field for field in dataclasses.fields(TrainingSetup) if field.name == knob.name)
    assert field.type == FIELD_TYPES[knob.kind] + (" | None" if knob.null else "")
    if knob.required:
        assert field.default is dataclasses.MISSING
    else:
        assert field.default is knob.default
        assert getattr(TrainingSetup(model="m", max_length=1), knob.name) == knob.default


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_what_a_row_names_is_there(knob: Knob) -> None:
    assert {need.other for need in knob.needs} <= set(KNOB_NAMES)
    assert set(knob.methods) <= set(METHODS)
    assert not knob.null or knob.default is None


def test_no_two_knobs_have_one_place() -> None:
    places = [(knob.section, knob.form.place) for knob in KNOBS if knob.form is not None]
    assert len(set(places)) == len(places)
    lines = [knob.line.place for knob in KNOBS if knob.line is not None]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "full", "lora_alpha": 8}, "lora_alpha applies to qlora and lora, but method is full"),
        (
            {"method": "full", "target_modules": ["q_proj"]},
            "target_modules applies to qlora and lora, but method is full",
        ),
        (
            {"method": "lora", "prepare_for_kbit_training": True},
            "prepare_for_kbit_training applies to qlora, but method is lora",
        ),
        (
            {"gradient_checkpointing": False, "checkpointed_layers": 4},
            "checkpointed_layers needs gradient_checkpointing true",
        ),
        (
            {"gradient_checkpointing": False, "selective_checkpointing": True},
            "selective_checkpointing needs gradient_checkpointing true",
        ),
        (
            {"gradient_checkpointing": False, "activation_memory_budget": 0.5},
            "activation_memory_budget needs compile regional",
        ),
        (
            {"compile": "regional", "activation_memory_budget": 0.5},
            "activation_memory_budget needs gradient_checkpointing false",
        ),
        (
            {"packing": True, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy group_by_length needs packing false: packed sequences are all of one "
            "length",
        ),
        ({"distributed": "ddp"}, "distributed needs num_processes of at least 2"),
        ({"num_processes": 2}, "num_processes of 2 or more needs distributed: ddp or fsdp"),
        # What the method does not use is told before what else is missing.
        (
            {"method": "lora", "prepare_for_kbit_training": True, "distributed": "ddp"},
            "prepare_for_kbit_training applies to qlora, but method is lora",
        ),
    ],
)
def test_a_contradiction_is_told_in_a_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as told:
        TrainingSetup(model="m", max_length=1, **values)
    assert str(told.value) == message


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_checkpointing": False, "checkpointed_layers": 0},
        {"method": "full", "lora_r": 64},
        {"method": "lora", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"method": "full", "lora_dropout": 0},
    ],
)
def test_what_means_nothing_there_but_harms_nothing_is_accepted(values: dict[str, Any]) -> None:
    TrainingSetup(model="m", max_length=1, **values)


@pytest.mark.parametrize("name", [knob.name for knob in KNOBS])
@pytest.mark.parametrize("value", [float("nan"), "no such", [], [[]], {}, b"x", 2**40, -1])
def test_a_value_that_is_not_accepted_names_the_field(name: str, value: object) -> None:
    with pytest.raises(FieldError) as told:
        TrainingSetup(**{"model": "m", "max_length": 1, name: value})
    assert told.value.field == name


@pytest.mark.parametrize(
    ("name", "value"), [("packing", 1), ("packing", 0), ("num_processes", True), ("lora_r", 16.0)]
)
def test_a_value_that_equals_an_accepted_one_has_its_type_as_well(name: str, value: object) -> None:
    with pytest.raises(FieldError):
        TrainingSetup(**{"model": "m", "max_length": 1, name: value})


def test_another_method_takes_every_knob_along_that_it_uses() -> None:
    setup = TrainingSetup(
        model="m",
        max_length=1,
        lora_r=64,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=["q_proj"],
        prepare_for_kbit_training=True,
    )
    lora = with_method(setup, "lora")
    assert lora == setup.replace(method="lora", prepare_for_kbit_training=False)
    assert with_method(setup, "full") == TrainingSetup(model="m", max_length=1, method="full", lora_r=64)
    assert differences(setup, lora) == ("method lora", "prepare for kbit training off")


def test_a_knob_of_its_own_row_is_told_where_setups_differ() -> None:
    now, then = warped(), warped(warp_drive="impulse")
    assert differences(now, then, knobs=MORE) == ("warp impulse",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"section": "elsewhere"},
        {"choices": ()},
        {"bounds": (0, 1)},
        {"default": "warp"},
        {"default": None},
        {"planned": "warp"},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="warp_drive"):
        dataclasses.replace(MADE_UP, **wrong)


def test_a_made_up_knob_is_an_option_with_help() -> None:
    parser = Parser(prog="plan")
    add_knobs(parser, MORE)
    words = " ".join(parser.format_help().split())
    assert "--warp-drive NAME how layers are folded (default: off): off, impulse, maximum" in words
    assert given_knobs(parser.parse_args(["--warp-drive", "impulse"]), MORE) == (("warp_drive", "impulse"),)
    with pytest.raises(InputError, match=r"unknown value of --warp-drive 'ludicrous' \(one of off, impulse"):
        parser.parse_args(["--warp-drive", "ludicrous"])


def test_a_made_up_knob_is_checked() -> None:
    check = setup_check(MORE)
    check(warped(warp_drive="impulse"))
    with pytest.raises(
        FieldError, match=r"^warp_drive: 'ludicrous' is not accepted; expected one of off, imp"
    ):
        check(warped(warp_drive="ludicrous"))
    with pytest.raises(InputError, match=r"^warp_drive needs packing false$"):
        check(warped(warp_drive="impulse", packing=True))
    with pytest.raises(InputError, match=r"^warp_drive applies to qlora and lora, but method is full$"):
        check(warped(warp_drive="impulse", method="full"))
    check(warped(packing=True, method="full"))
    assert refused_by("full", MORE)["warp_drive"] == "off"
    assert "warp_drive" not in refused_by("lora", MORE)


def test_a_made_up_knob_has_a_row_on_the_form() -> None:
    rows = form.rows(MORE)
    assert len(rows) == len(form.ROWS) + 1
    row = next(row for row in rows if row.field == "warp_drive")
    assert (row.label, row.choices, row.group) == ("warp", ("off", "impulse", "maximum"), "")
    texts = form.to_texts(TrainingSetup(model="m", max_length=1))
    assert row.applies(texts)
    assert not row.applies({**texts, "packing": form.ON})
    assert not row.applies({**texts, "method": "full"})


def test_a_made_up_knob_counts_in_what_runs_cover() -> None:
    count = knob_counter(MORE)
    assert ("warp_drive", "off") in count(TrainingRun(setup=warped(), model=MODEL))
    assert ("warp_drive", "impulse") in count(TrainingRun(setup=warped(warp_drive="impulse"), model=MODEL))
    assert "warp_drive" not in dict(count(TrainingRun(setup=warped(method="full"), model=MODEL)))
    assert "warp_drive" in together(MORE)


def test_a_made_up_knob_is_in_the_documentation() -> None:
    line = (
        "| `warp_drive` | how layers are folded | off, impulse, maximum | `off` |  "
        "| all but `off` need method qlora or lora and packing false |"
    )
    assert line in knobs_page(MORE).splitlines()


def test_a_made_up_knob_has_a_line_in_the_plans_text() -> None:
    assert dict(knob_lines(warped(), MORE)) == {}
    assert list(knob_lines(warped(warp_drive="impulse", activation_offloading=True), MORE)) == [
        ("warp drive", "impulse"),
        ("activation offloading", "on"),
    ]


def test_what_a_plan_takes_for_a_made_up_knob_needs_what_the_knob_needs() -> None:
    taken = (*KNOBS, dataclasses.replace(MADE_UP, planned="impulse"))
    assert planned({}, taken)["warp_drive"] == "impulse"
    assert planned({"warp_drive": "maximum"}, taken)["warp_drive"] == "maximum"
    assert "warp_drive" not in planned({"packing": True}, taken)
    assert "distributed" not in planned({})
    assert planned({"num_processes": 2})["distributed"] == "ddp"
