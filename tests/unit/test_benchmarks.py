"""Benchmarks: which profiles they make, and how they judge what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import chat, kills, measure, referee, rivals
from benchmarks.measured import capped_target, environment, memory_cap_bytes, same_run, tokens_per_second
from benchmarks.rival_setups import device_seconds
from launcher.measuring.profile import Profile, profile_line, read_profiles
from planner.calibration.records import Environment, RunRecord, append_record
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import load_shipped
from planner.search.evaluator import Evaluator
from planner.setup.cuda_allocator import ALLOCATORS, machine_allocator

PAIR = ("llama-3.2-3b", "12GB")


def record(
    profile: Profile,
    *,
    step: float = 1.0,
    update: float = 0.0,
    outcome: str = "ok",
    useful: float | None = None,
) -> RunRecord:
    """What a run of a profile would leave, every step as long as the others."""
    steps = 2 + profile.steps if outcome == "ok" else 0
    return RunRecord(
        id="test",
        created="2026-01-01T00:00:00+00:00",
        source="calibrate",
        setup=profile.setup,
        model_parameter_count=1,
        environment=Environment(
            gpu_name="GPU",
            gpu_id="h100-80gb",
            compute_capability=(9, 0),
            total_bytes=2**36,
            driver="CUDA 13.0",
            python="3.12",
            versions=(("torch", "2.11"),),
        ),
        outcome=outcome,
        weights_bytes=0,
        context_bytes=0,
        phases=(),
        step_seconds=(step,) * steps,
        update_seconds=(update,) * steps,
        tokens_per_second=1.0 if outcome == "ok" else None,
        useful_tokens_per_second=useful,
        predicted=None,
        memory_cap_bytes=profile.memory_cap_bytes,
        allocator=profile.allocator or machine_allocator(),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("referee")
    referee.make(folder, (PAIR,))
    return folder


def test_a_pair_has_the_choice_and_at_least_20_distinct_rivals_that_fit(made: Path) -> None:
    ((pair, profiles),) = referee.read_pairs(made)
    setups = [profile.setup.replace(gradient_accumulation_steps=1) for profile in profiles]
    assert len(set(setups)) == len(setups)
    target = capped_target(pair["card"])
    evaluator = Evaluator(load_shipped(pair["model"]), target.spec, target.usable_bytes)
    assert sum(evaluator.fits(evaluator.evaluate(setup)) for setup in setups[1:]) >= 20
    assert all(evaluator.may_fit(evaluator.evaluate(setup)) for setup in setups)


def test_rivals_are_spread_over_executions_micro_batches_and_checkpointing(made: Path) -> None:
    ((_, profiles),) = referee.read_pairs(made)
    rivals_ = [profile.setup for profile in profiles[1:]]
    assert {"none", "liger"} == {setup.kernels for setup in rivals_}
    assert {"none", "regional"} == {setup.compile for setup in rivals_}
    assert len({setup.per_device_train_batch_size for setup in rivals_}) >= 3
    assert len({setup.optim for setup in rivals_}) >= 2
    assert any(not setup.gradient_checkpointing for setup in rivals_)
    assert any(setup.checkpointed_layers for setup in rivals_)
    assert any(setup.selective_checkpointing for setup in rivals_)
    assert any(setup.activation_memory_budget is not None for setup in rivals_)


def test_rivals_that_were_measured_for_an_earlier_choice_stay(made: Path, tmp_path: Path) -> None:
    ((_, profiles),) = referee.read_pairs(made)
    before = [profile for profile in profiles if profile.setup.kernels == "liger"]
    near = [dataclasses.replace(one, memory_cap_bytes=one.memory_cap_bytes - 2**26) for one in before]
    far = [dataclasses.replace(profiles[1], memory_cap_bytes=2**33)]
    records = [record(one) for one in (*near, *far)]
    referee.make(tmp_path, (PAIR,), records)
    ((_, again),) = referee.read_pairs(tmp_path)
    assert again[0] == profiles[0]
    assert {(one.setup, one.memory_cap_bytes) for one in near} < {
        (one.setup, one.memory_cap_bytes) for one in again
    }
    assert len(again) == len({one.setup for one in again}) > 20
    to_measure = read_profiles(tmp_path / "plain.jsonl")
    assert to_measure[0] == profiles[0]
    assert not {one.setup for one in to_measure} & {one.setup for one in near}


def test_profiles_with_liger_and_those_that_may_not_fit_have_files_of_their_own(made: Path) -> None:
    ((_, profiles),) = referee.read_pairs(made)
    files = {name: read_profiles(made / f"{name}.jsonl") for name in ("plain", "liger", "doubtful")}
    assert sorted(map(profile_line, sum(files.values(), ()))) == sorted(map(profile_line, profiles))
    assert {profile.setup.kernels for profile in files["plain"]} == {"none"}
    assert {profile.setup.kernels for profile in files["liger"]} == {"liger"}
    assert files["plain"][0] == profiles[0]
    assert 60 < device_seconds(profiles) < 250


def test_the_cap_leaves_room_for_what_lies_outside_the_allocator() -> None:
    target = capped_target("12GB")
    setup = Profile(setup=_setup()).setup
    cap = memory_cap_bytes(setup, target.usable_bytes)
    assert 0.5 * 2**30 < target.usable_bytes - cap < 1.5 * 2**30
    assert target.spec == gpu_catalog().get("h100-80gb")
    assert target.usable_bytes < 12 * 2**30


def _setup(**changes: object):  # type: ignore[no-untyped-def]
    from planner.setup.training_setup import TrainingSetup

    return TrainingSetup(model="llama-3.2-3b", max_length=1000).replace(**changes)


def test_the_update_is_counted_once_at_the_real_accumulation() -> None:
    one = Profile(setup=_setup(gradient_accumulation_steps=2), steps=3)
    # Two passes of 1 s and an update of 0.5 s; sixteen passes and one update at the real accumulation.
    assert tokens_per_second(record(one, step=2.5, update=0.5), 16) == pytest.approx(16_000 / 16.5)
    assert tokens_per_second(record(one, outcome="oom"), 16) is None


def test_rivals_near_the_choice_are_measured_again_with_more_steps(made: Path) -> None:
    ((_, profiles),) = referee.read_pairs(made)
    records = [record(profile, step=1.0 + index) for index, profile in enumerate(profiles)]
    assert referee.finalists(referee.results(profiles, records), profiles[0]) == []
    fast = next(one for one in profiles[1:] if one.setup.gradient_accumulation_steps == 1)
    records.append(record(fast, step=0.01))
    found = referee.finalists(referee.results(profiles, records), profiles[0])
    assert found == [profiles[0], fast]
    referee.finals(made, records)
    again = read_profiles(made / "finals.jsonl")
    assert {one.setup for one in again} == {profiles[0].setup, fast.setup}
    assert {one.steps for one in again} == {referee.FINAL_STEPS}


def test_finals_decide_where_they_were_run(made: Path) -> None:
    ((pair, profiles),) = referee.read_pairs(made)
    records = [record(profile, step=10.0) for profile in profiles]
    records[-1] = record(profiles[-1], outcome="oom")
    chosen, rival = profiles[0], profiles[1]
    first = [record(chosen, step=1.0), record(rival, step=0.001), *records[2:]]
    verdict = referee.verdict(pair, profiles, first, ())
    assert verdict is not None
    assert verdict["ratio"] < 0.5
    assert verdict["best"] == referee.describe(rival.setup)
    assert (verdict["other_feasible"], verdict["out_of_memory"]) == (len(profiles) - 2, 1)
    finals = [record(chosen, step=1.0), record(rival, step=100.0)]
    verdict = referee.verdict(pair, profiles, first, finals)
    assert verdict is not None
    assert verdict["ratio"] == 1.0
    assert verdict["decided_by_finals"]


def test_a_pair_that_was_not_measured_has_no_verdict(made: Path) -> None:
    ((pair, profiles),) = referee.read_pairs(made)
    assert referee.verdict(pair, profiles, (), ()) is None


def test_measuring_goes_on_where_it_was(tmp_path: Path) -> None:
    one, other = Profile(setup=_setup()), Profile(setup=_setup(lora_r=8))
    lines = [profile_line(one), profile_line(other), profile_line(one)]
    (tmp_path / "profiles").write_text("\n".join(lines) + "\n")
    output = tmp_path / "records"
    assert measure.remaining(tmp_path / "profiles", output) == lines
    append_record(output, record(one))
    assert measure.remaining(tmp_path / "profiles", output) == lines[1:]
    assert not same_run(one, record(Profile(setup=one.setup, memory_cap_bytes=2**30)))
    for allocator in ALLOCATORS:
        measured = record(Profile(setup=one.setup, allocator=allocator))
        assert same_run(one, measured) == (allocator == machine_allocator())


def test_records_of_two_environments_are_not_compared() -> None:
    one = record(Profile(setup=_setup()))
    assert environment([one, one])["gpu"] == "GPU"
    with pytest.raises(ValueError, match="0 environments"):
        environment([])


def test_every_contender_gets_the_same_cap_and_effective_batch() -> None:
    found = list(rivals.tasks(("12GB",), checkpoint=Path("checkpoint")))
    assert [task["kind"] for task in found] == list(rivals.CONTENDERS)
    assert len({(task["memory_cap_bytes"], task["effective_batch_size"]) for task in found}) == 1
    planned = found[0]["setup"]
    assert planned["per_device_train_batch_size"] * planned["gradient_accumulation_steps"] == 16
    assert (planned["lora_r"], planned["lora_dropout"], planned["max_length"]) == (16, 0.0, 2048)


def test_rivals_go_on_with_the_micro_batches_that_are_left() -> None:
    task = {"kind": "unsloth", "card": "12GB", "micro_batches": [1, 2, 4, 8], "padding_choice": "auto"}
    done = {"contender": "unsloth", "card": "12GB", "outcome": "ok", "per_device_train_batch_size": 1}
    assert rivals.remaining(task, []) == task
    left = rivals.remaining(task, [done])
    assert left is not None
    assert left["micro_batches"] == [2, 4, 8]
    assert rivals.remaining(task, [done, {**done, "outcome": "oom"}]) is None
    assert rivals.remaining({**task, "padding_choice": "padded"}, [done]) is not None
    assert rivals.remaining({"kind": "trl", "card": "16GB"}, [done]) is not None
    assert rivals.remaining({"kind": "trl", "card": "12GB"}, [{**done, "contender": "trl"}]) is None


def test_the_best_micro_batch_of_each_contender_counts() -> None:
    def line(contender: str, rate: float | None, micro: int) -> dict[str, object]:
        return {
            "contender": contender,
            "card": "24GB",
            "outcome": "ok" if rate else "oom",
            "tokens_per_second": rate,
            "per_device_train_batch_size": micro,
            "setup": "as told",
            "allocated_bytes": 0,
            "reserved_bytes": 0,
        }

    (row,) = rivals.compare(
        [
            line("vramwise", 12_000.0, 2),
            line("unsloth", 6_000.0, 1),
            line("unsloth", 10_000.0, 4),
            line("unsloth", None, 8),
            line("trl", 4_000.0, 1),
        ]
    )
    assert row["unsloth"]["per_device_train_batch_size"] == 4
    assert (row["over_unsloth"], row["bar_over_unsloth"]) == (1.2, 1.1)
    assert (row["over_trl"], row["bar_over_trl"]) == (3.0, 1.5)


def test_chat_lengths_are_many_short_ones_and_few_long_ones() -> None:
    drawn = chat.lengths(chat.EXAMPLES)
    assert drawn == chat.lengths(chat.EXAMPLES)
    assert (min(drawn) >= 50, max(drawn)) == (True, 4000)
    assert sorted(drawn)[len(drawn) // 2] == pytest.approx(400, rel=0.05)
    stats = chat.statistics(drawn)
    assert sum(length * count for length, count in stats.lengths) == sum(drawn) == stats.loss_tokens


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    chat.make(folder, "llama-3.2-3b", ("16GB",))
    return folder


def test_every_chat_strategy_trains_the_same_examples_at_most_a_few_rows_apart(talked: Path) -> None:
    profiles = read_profiles(talked / "chat.jsonl")
    named = json.loads((talked / "strategies.json").read_text())
    assert {one["strategy"] for one in named} >= {chat.BASELINE, chat.LARGER, *chat.STRATEGIES}
    assert {profile.lengths for profile in profiles} == {chat.lengths(chat.EXAMPLES)}
    for profile in profiles:
        setup = profile.setup
        if not setup.packing:
            assert setup.effective_batch_size == 16
            assert profile.steps * 16 >= chat.EXAMPLES
    (base,) = (one["profile"] for one in named if one["strategy"] == chat.BASELINE)
    assert (base["packing"], base["kernels"], base["compile"]) == (False, "none", "none")
    assert (base["gradient_checkpointing"], base["optim"]) == (True, "adamw_torch_fused")


def test_chat_rates_are_compared_with_the_better_of_the_padded_batches_that_ran(talked: Path) -> None:
    named = json.loads((talked / "strategies.json").read_text())
    lines = talked / "all.jsonl"
    lines.write_text("".join(json.dumps(one["profile"]) + "\n" for one in named))
    profiles = read_profiles(lines)
    rates = {chat.BASELINE: 1000.0}

    def over(larger: str, rate: float = 1250.0) -> dict[str, float | None]:
        rates[chat.LARGER] = rate
        records = [
            record(
                profile,
                useful=rates.get(one["strategy"], 5000.0),
                outcome=larger if one["strategy"] == chat.LARGER else "ok",
            )
            for one, profile in zip(named, profiles, strict=True)
        ]
        return {row["strategy"]: row["over_baseline"] for row in chat.rows(named, profiles, records)}

    assert over("ok")[chat.PLAN] == 4.0
    assert over("ok", 800.0)[chat.PLAN] == 5.0
    assert over("oom")[chat.PLAN] == 5.0


def test_kills_are_counted_on_from_where_they_were_on_the_same_launcher_alone(tmp_path: Path) -> None:
    path = tmp_path / "kills.json"
    tally = kills.begun_tally(path, seed=3)
    tally.trainers_killed, tally.runs_finished = 7, 2
    tally.killed_amid["training"] += 7
    path.write_text(json.dumps({**kills.result(tally), "machine": {"cores": 2}}))
    assert kills.begun_tally(path, seed=3) == tally
    assert kills.begun_tally(path, seed=4).trainers_killed == 0
    path.write_text(json.dumps({**kills.result(tally), "launcher_sha256": "another"}))
    assert kills.begun_tally(path, seed=3).trainers_killed == 0
