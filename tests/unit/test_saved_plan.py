"""A plan is saved and read as it was, and launched only as it is, or estimated anew for what is here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.commands import saved_plan, train
from planner.answers.plan import Plan, Release
from planner.base.errors import InputError
from planner.commands.program import Parser
from planner.data.lengths import DatasetStats
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.planning.made_with import to_keep
from planner.planning.make_plan import make_plan
from planner.planning.recheck import recheck
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup
from planner.throughput.epoch import Examples

Cli = Callable[..., Any]
MODEL = "qwen2.5-0.5b"


def lengths(*each: int, times: int) -> DatasetStats:
    return DatasetStats.from_lengths(
        list(each) * times, loss_tokens=9000, loss_on="all", data_format="text", estimated=False
    )


STATS = lengths(100, 300, 900, times=40)
REQUEST = make_request(MODEL, gpu="16GB", knobs={"max_length": 1024}, data="data.jsonl")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(REQUEST, stats=STATS, longest=True)


def values_of(hint: Any, setup: TrainingSetup) -> st.SearchStrategy[Any]:
    """Values of a field by its type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return st.one_of(*(values_of(one, setup) for one in arguments))
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(arguments[0], setup), max_size=3).map(tuple)
    if hint is TrainingSetup:
        return st.just(setup)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        kept = [f.name for f in dataclasses.fields(hint) if f.metadata.get("in_json", True)]
        return st.builds(hint, **{name: values_of(hints[name], setup) for name in kept})
    simple = {float: st.floats(allow_nan=False, allow_infinity=False), int: st.integers(), str: st.text()}
    return {**simple, bool: st.booleans(), types.NoneType: st.none()}[hint]


# Checked against each other where they are made: these stay those of a real plan.
WHOLE = ("request", "gpu", "setup", "memory", "neighbours", "runners_up")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_plan_is_read_as_it_was_written(plan: Plan, data: st.DataObject) -> None:
    hints = typing.get_type_hints(Plan)
    names = data.draw(st.sets(st.sampled_from(sorted(hints.keys() - set(WHOLE))), max_size=4))
    drawn = {name: data.draw(values_of(hints[name], plan.setup), label=name) for name in names}
    changed = dataclasses.replace(plan, **drawn)
    written = json.dumps(changed.to_dict(), allow_nan=False)
    assert Plan.from_dict(json.loads(written)) == changed


def test_plan_saves_what_json_prints(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.json"
    finished = cli("plan", MODEL, "16GB", "-o", path, "--json")
    assert finished.code == 0
    assert path.read_text() == finished.out
    assert Plan.from_dict(json.loads(path.read_text())).fits
    assert [one.name for one in path.parent.iterdir()] == ["plan.json"]
    refused = cli("plan", MODEL, "16GB", "-o", tmp_path)
    assert refused.code == 2
    assert str(tmp_path) in refused.err


def asked(path: Path, *options: str) -> argparse.Namespace:
    parser = Parser(prog="vramwise train")
    train.add_arguments(parser)
    return parser.parse_args([f"--plan={path}", *options])


@pytest.fixture
def saved(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(to_keep(plan).to_dict()))
    return path


@pytest.mark.parametrize(
    "options",
    [
        ("--lora-r", "3"),
        ("--max-length", "512"),
        ("--method", "lora"),
        ("--bnb-4bit-quant-type", "fp4"),
        ("--target-modules", "q_proj"),
        ("--gpu", "24GB"),
        ("--epochs", "7"),
        ("--learning-rate", "0.5"),
        ("--effective-batch-size", "3"),
        ("--display",),
        ("--price-per-hour", "3"),
    ],
    ids=" ".join,
)
def test_what_contradicts_the_plan_is_refused_by_name(
    plan: Plan, saved: Path, options: tuple[str, ...]
) -> None:
    if options == ("--no-packing",):
        options = ("--no-packing",) if plan.setup.packing else ("--packing",)
    with pytest.raises(InputError, match=f"^{options[0]} .*contradicts"):
        saved_plan.take_saved_plan(asked(saved, *options))


def test_what_the_plan_says_too_may_be_given(plan: Plan, saved: Path) -> None:
    rank, epochs = str(plan.setup.lora_r), str(plan.schedule.num_train_epochs)
    args = asked(saved, "--lora-r", rank, "--epochs", epochs, "--gpu", "16GB", "--max-length", "1024")
    assert saved_plan.take_saved_plan(args) == to_keep(plan)
    assert (args.model, args.data) == (MODEL, "data.jsonl")


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    for content, said in (("{", "not"), ("[]", "JSON object"), ('{"version": 99}', "plan version")):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(InputError, match=r"p\.json") as raised:
            saved_plan.take_saved_plan(asked(tmp_path / "p.json"))
        assert said in str(raised.value) or content == "{"


class Here:
    """What is here: the same as in the plan, but for what a test changes."""

    def __init__(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan, self.patch = plan, monkeypatch

    def versions(self, **found: str) -> None:
        releases = tuple(Release(name=name, version=version) for name, version in found.items())
        self.patch.setattr("planner.planning.made_with.installed", lambda: releases)

    def launched(self, *, name: str = MODEL, stats: DatasetStats = STATS, on_gpu: bool = False) -> Plan:
        model = resolve_model(name)
        return saved_plan.plan_for_here(
            self.plan, name=name, model=model, stats=stats, data="here.jsonl", on_gpu=on_gpu
        )


@pytest.fixture
def here(plan: Plan, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """The plan as it was read from its file, on the machine that wrote it."""
    return Here(Plan.from_dict(json.loads(saved.read_text())), monkeypatch)


def test_where_nothing_differs_the_plan_is_launched_as_it_is(
    here: Here, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    found = here.launched()
    assert "launched as it is" in capsys.readouterr().err
    request = dataclasses.replace(plan.request, data="here.jsonl")
    assert found.data is not None
    data = dataclasses.replace(found.data, path="here.jsonl")
    assert found == dataclasses.replace(here.plan, request=request, data=data)


def test_what_counts_is_what_the_plan_was_made_with_and_not_what_its_figures_rest_on(
    here: Here, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest torch is on every machine another one than that of the measured runs."""
    measured = dict(plan.memory.basis.stack_versions)["torch"]
    assert not measured.startswith("99.")
    here.versions(vramwise="0.1.0", torch="99.0+cpu", trl="99.1")
    for made_with, differs in (
        ((("torch", "99.0+cu130"), ("trl", "99.1")), ""),
        (
            (("torch", measured), ("trl", "99.1")),
            f"torch 99.0+cpu is installed, the plan was made with {measured}",
        ),
        ((("vramwise", "0.0.1"),), "vramwise 0.1.0 is installed, the plan was made with 0.0.1"),
        ((("vramwise", "0.1.0"), ("peft", "1.0")), ""),
        ((), "the plan does not say with which versions it was made"),
    ):
        releases = tuple(Release(name=name, version=version) for name, version in made_with)
        here.plan = dataclasses.replace(plan, made_with=releases)
        here.launched()
        said = capsys.readouterr().err
        assert ("launched as it is" in said) == (not differs), said
        assert differs in said
        assert ("estimated anew" in said) == bool(differs)


def test_another_release_card_or_other_data_are_said_and_estimated_anew(
    here: Here, plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = next(one.version for one in here.plan.made_with if one.name == "vramwise")
    here.versions(vramwise="0.0.1")
    longer = lengths(100, 800, times=90)
    monkeypatch.setattr(
        "planner.gpus.target.local_target", lambda: dataclasses.replace(resolve_gpu("rtx-4090"), index=0)
    )
    found = here.launched(stats=longer, on_gpu=True)
    said = capsys.readouterr().err
    assert f"vramwise 0.0.1 is installed, the plan was made with {version}" in said
    assert "the card here is rtx-4090, the plan is for rtx-5060-ti-16gb" in said
    assert "the data has 180 examples" in said
    assert "in the plan 120" in said
    assert "estimated anew" in said
    assert found.setup == plan.setup
    assert found.schedule == plan.schedule
    assert found.gpu.spec.id == "rtx-4090"
    fresh = recheck(
        plan,
        model=resolve_model(MODEL),
        target=resolve_gpu("rtx-4090"),
        data="here.jsonl",
        examples=Examples(longer),
    )
    assert (found.memory, found.speed, found.duration) == (fresh.memory, fresh.speed, fresh.duration)
    assert found.speed != plan.speed


def test_an_estimate_anew_of_the_same_is_the_plans_own(plan: Plan) -> None:
    """By the functions that planned: anything else would say something of the functions."""
    found = recheck(
        plan, model=resolve_model(MODEL), target=plan.gpu, data="data.jsonl", examples=Examples(STATS)
    )
    assert (found.memory, found.speed, found.duration, found.data) == (
        plan.memory,
        plan.speed,
        plan.duration,
        plan.data,
    )
    assert found.fits == plan.fits


def test_a_card_that_is_too_small_here_does_not_fit(plan: Plan) -> None:
    target = dataclasses.replace(plan.gpu, usable_bytes=2**28)
    found = recheck(
        plan, model=resolve_model(MODEL), target=target, data="data.jsonl", examples=Examples(STATS)
    )
    assert not found.fits


def test_another_model_contradicts_the_plan(here: Here) -> None:
    with pytest.raises(InputError, match=r"--model qwen2\.5-1\.5b contradicts the plan"):
        here.launched(name="qwen2.5-1.5b")
