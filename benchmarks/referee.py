"""Brute force as referee: is the plan's choice the fastest of many setups that fit?

    python -m benchmarks.referee make FOLDER [RECORDS] [--pairs N] [--model ID --card CARD]
    python -m benchmarks.measure FOLDER/plain.jsonl FOLDER/liger.jsonl FOLDER/doubtful.jsonl --output RECORDS
    python -m benchmarks.referee finals FOLDER RECORDS
    python -m benchmarks.measure FOLDER/finals.jsonl --output FINALS
    python -m benchmarks.referee judge FOLDER RECORDS [FINALS]

`make` plans each pair of model and memory, at one length and effective batch, for the measured GPU with no
more memory than the smaller card leaves, and picks rivals from all setups that may fit
(benchmarks/rival_setups.py). Where RECORDS of earlier choices are given, what was measured under nearly the
same cap stays a rival, and only the choice and the rivals that are forecast nearest to it are new. Runs are
cut to one or two micro-batches a step; the rate that is compared is that at the real accumulation: the update
after the last backward pass is timed apart and counted once (benchmarks/measured.py). `finals` lists the
choice and the rivals near it once more, with more steps, since the best of many noisy figures is too high.
`judge` writes benchmarks/results/referee.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured import (
    MEASURED_ON,
    capped_target,
    environment,
    memory_cap_bytes,
    same_run,
    tokens_per_second,
)
from benchmarks.results import write_result
from benchmarks.rival_setups import DOUBTFUL, Rival, device_seconds, profile_of, rivals
from launcher.measuring.profile import Profile, profile_line, read_profiles
from planner.calibration.records import RunRecord, read_records
from planner.gpus.target import GpuTarget
from planner.models.catalog import load_shipped
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest
from planner.setup.training_setup import TrainingSetup

LENGTH = 2048
EFFECTIVE_BATCH = 16
BAR = 0.97
FINAL_STEPS = 16
FINALISTS = 2
FINAL_SHARE = 0.95
"""Rivals this near to the choice are measured again."""
SAME_CAP_SHARE = 0.02
"""Caps that are this near are of one card: what lies outside the allocator is foretold anew each time."""
NEW_RIVALS = 4
"""Rivals of a pair that are measured beside earlier ones, or more until there are LEAST_RIVALS."""
LEAST_RIVALS = 21
PAIRS = (
    ("llama-3.1-8b", "16GB"),
    ("llama-3.2-3b", "12GB"),
    ("qwen3-8b", "24GB"),
    ("gemma-3-4b", "12GB"),
    ("llama-3.1-8b", "12GB"),
    ("llama-3.1-8b", "24GB"),
    ("mistral-7b-v0.3", "16GB"),
    ("qwen2.5-14b", "16GB"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One setup of a pair, measured."""

    profile: Profile
    outcome: str
    tokens_per_second: float | None


def make(folder: Path, pairs: Sequence[tuple[str, str]], records: Sequence[RunRecord] = ()) -> None:
    """Write the profiles that are to be measured, and pairs.json: the plan's choice and all its rivals."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"plain": [], "liger": [], "doubtful": []}
    described, total = [], 0.0
    for model, card in pairs:
        target = capped_target(card)
        request = PlanRequest(
            model=model,
            gpu=MEASURED_ON,
            knobs=(("max_length", LENGTH),),
            effective_batch_size=EFFECTIVE_BATCH,
        )
        plan = make_plan(request, target=target)
        if not plan.fits:
            print(f"{model} does not fit on {card}")
            continue
        profiles, wanted = pool(plan.setup, target, records)
        seconds = device_seconds(tuple(wanted.values()))
        total += seconds
        print(
            f"{model} {card}: {plan.strategy}, {len(profiles) - 1} rivals, about {seconds:.0f} s to measure"
        )
        for one, profile in wanted.items():
            print("  ", describe(one.setup), "" if one.sure else DOUBTFUL)
            kind = "plain" if one.setup.kernels == "none" else "liger"
            lines[kind if one.sure else "doubtful"].append(profile_line(profile))
        speed = plan.speed
        described.append(
            {
                "model": model,
                "card": card,
                "usable_bytes": target.usable_bytes,
                "forecast_tokens_per_second": None if speed is None else speed.tokens_per_second,
                "profiles": [json.loads(profile_line(profile)) for profile in profiles],
            }
        )
    for kind, found_lines in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(line + "\n" for line in found_lines), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    print(f"about {total:.0f} s in all, and three process starts")


def pool(
    chosen: TrainingSetup, target: GpuTarget, records: Sequence[RunRecord]
) -> tuple[list[Profile], dict[Rival, Profile]]:
    """Profiles of the choice, first, and of all its rivals; and those that are still to be measured."""
    choice = Rival(setup=chosen, sure=True, contender=True)
    every = {
        one: profile_of(one, memory_cap_bytes(one.setup, target.usable_bytes))
        for one in (choice, *rivals(chosen, target))
    }
    known = measured_profiles(chosen.model, memory_cap_bytes(chosen, target.usable_bytes), records)
    wanted = {one: profile for one, profile in every.items() if profile.setup not in known}
    if known:
        sure = [one for one in wanted if one.sure]
        sure.sort(key=lambda one: (one != choice, not one.contender, one.setup.compile == "none"))
        count = max(NEW_RIVALS, LEAST_RIVALS - len(known)) + (choice in sure)
        wanted = {one: wanted[one] for one in sure[:count]}
    first = known.pop(every[choice].setup, every[choice])
    return [first, *(one for one in wanted.values() if one != first), *known.values()], wanted


def measured_profiles(
    model: str, memory_cap_bytes: int, records: Sequence[RunRecord]
) -> dict[TrainingSetup, Profile]:
    """Profiles of a model that records have under nearly that cap, one for each setup."""
    return {
        record.setup: Profile(setup=record.setup, memory_cap_bytes=record.memory_cap_bytes)
        for record in records
        if record.setup.model == model
        and abs((record.memory_cap_bytes or 0) / memory_cap_bytes - 1) < SAME_CAP_SHARE
    }


def describe(setup: TrainingSetup) -> str:
    """A setup's execution in a few words."""
    layers = load_shipped(setup.model).num_hidden_layers
    kept = "not checkpointed"
    if setup.gradient_checkpointing:
        some = setup.checkpointed_layers
        kept = f"{layers if some is None else some} of {layers} checkpointed"
    words = [
        {"none": "eager", "liger": "liger"}[setup.kernels] if setup.compile == "none" else "compiled",
        f"batch {setup.per_device_train_batch_size}",
        kept,
    ]
    words += ["liger"] * (setup.compile != "none" and setup.kernels == "liger")
    words += ["selective"] * setup.selective_checkpointing
    words += ["offloaded"] * setup.activation_offloading
    if setup.activation_memory_budget is not None:
        words.append(f"budget {setup.activation_memory_budget:g}")
    return ", ".join([*words, setup.optim])


def read_pairs(folder: Path) -> list[tuple[dict[str, Any], tuple[Profile, ...]]]:
    """Each pair's own figures, and its profiles, the choice first."""
    found = []
    for index, pair in enumerate(json.loads((folder / "pairs.json").read_text(encoding="utf-8"))):
        lines = folder / f".pair-{index}.jsonl"
        lines.write_text("".join(json.dumps(one) + "\n" for one in pair.pop("profiles")), encoding="utf-8")
        found.append((pair, read_profiles(lines)))
        lines.unlink()
    return found


def results(
    profiles: Sequence[Profile], records: Sequence[RunRecord], effective_batch: int = EFFECTIVE_BATCH
) -> list[Result]:
    """What became of profiles that were measured, in their order; of several records the last."""
    found = []
    for profile in profiles:
        own = [record for record in records if same_run(profile, record)]
        if not own:
            continue
        accumulation = effective_batch // profile.setup.per_device_train_batch_size
        rate = tokens_per_second(own[-1], accumulation) if own[-1].outcome == "ok" else None
        found.append(Result(profile=profile, outcome=own[-1].outcome, tokens_per_second=rate))
    return found


def finalists(found: Sequence[Result], chosen: Profile) -> list[Profile]:
    """The choice and the fastest rivals near or above it, the choice first and last."""
    rates = {one.profile: one.tokens_per_second for one in found if one.tokens_per_second is not None}
    if chosen not in rates:
        return []
    near = [one for one in rates if one != chosen and rates[one] >= FINAL_SHARE * rates[chosen]]
    near = sorted(near, key=lambda one: rates[one], reverse=True)[:FINALISTS]
    return [chosen, *near] if near else []


def finals(folder: Path, records: Sequence[RunRecord]) -> None:
    """Write finals.jsonl, those with Liger's kernels last: no run without them can follow in a process."""
    lines = []
    for _, profiles in read_pairs(folder):
        for one in finalists(results(profiles, records), profiles[0]):
            again = Profile(
                setup=one.setup,
                steps=FINAL_STEPS,
                memory_cap_bytes=one.memory_cap_bytes,
            )
            lines.append((one.setup.kernels != "none", profile_line(again)))
    lines.sort(key=lambda line: line[0])
    (folder / "finals.jsonl").write_text("".join(line + "\n" for _, line in lines), encoding="utf-8")
    print(f"{len(lines)} finals")


def verdict(
    pair: dict[str, Any],
    profiles: Sequence[Profile],
    records: Sequence[RunRecord],
    finals_: Sequence[RunRecord],
) -> dict[str, Any] | None:
    """A pair's outcome, None if not measured: finals decide where they were run, else the first runs."""
    found = results(profiles, records)
    chosen = next((one for one in found if one.profile == profiles[0]), None)
    if chosen is None:
        return None
    last = {one.profile: one for one in results(profiles, finals_) if one.tokens_per_second is not None}
    deciding = list(last.values()) if chosen.profile in last else found
    timed = [one for one in deciding if one.tokens_per_second is not None]
    best = max(timed, key=lambda one: one.tokens_per_second or 0.0) if timed else None
    own = last.get(chosen.profile, chosen).tokens_per_second
    best_rate = None if best is None else best.tokens_per_second
    return {
        **pair,
        "chosen": describe(chosen.profile.setup),
        "chosen_outcome": chosen.outcome,
        "chosen_tokens_per_second": own and round(own, 1),
        "best": best and describe(best.profile.setup),
        "best_tokens_per_second": best_rate and round(best_rate, 1),
        "ratio": round(own / best_rate, 4) if own and best_rate else None,
        "other_feasible": sum(one.outcome == "ok" for one in found) - (chosen.outcome == "ok"),
        "out_of_memory": sum(one.outcome == "oom" for one in found),
        "decided_by_finals": chosen.profile in last,
        "setups": [
            {
                "setup": describe(one.profile.setup),
                "outcome": one.outcome,
                "tokens_per_second": one.tokens_per_second and round(one.tokens_per_second, 1),
                "final_tokens_per_second": round(again.tokens_per_second, 1)
                if (again := last.get(one.profile)) is not None and again.tokens_per_second
                else None,
            }
            for one in found
        ],
    }


def judge(folder: Path, records: Sequence[RunRecord], finals_: Sequence[RunRecord]) -> None:
    """Print a line a pair and write the result."""
    found = [verdict(pair, profiles, records, finals_) for pair, profiles in read_pairs(folder)]
    measured = [one for one in found if one is not None]
    for one in measured:
        print(
            f"{one['model']} {one['card']}: chosen {one['chosen']} "
            f"{one['chosen_tokens_per_second']} tokens/s, "
            f"best {one['best']} {one['best_tokens_per_second']}, ratio {one['ratio']}, "
            f"{one['other_feasible']} others fit"
        )
    reached = sum((one["ratio"] or 0.0) >= BAR for one in measured)
    print(f"{reached} of {len(measured)} pairs reach {BAR:.0%} of the best")
    write_result(
        "referee",
        {
            "bar": BAR,
            "pairs_at_bar": reached,
            "max_length": LENGTH,
            "effective_batch_size": EFFECTIVE_BATCH,
            "environment": environment([*records, *finals_]),
            "pairs": measured,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "finals", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path, nargs="*", help="RECORDS, then FINALS")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs, from the first")
    parser.add_argument("--model")
    parser.add_argument("--card")
    arguments = parser.parse_args()
    first, last = [*arguments.records, None, None][:2]
    records = tuple(read_records(first)) if first else ()
    if arguments.what == "make":
        one = ((arguments.model, arguments.card),)
        make(arguments.folder, one if arguments.model else PAIRS[: arguments.pairs], records)
        return
    again = tuple(read_records(last)) if last else ()
    finals(arguments.folder, records) if arguments.what == "finals" else judge(
        arguments.folder, records, again
    )


if __name__ == "__main__":
    main()
