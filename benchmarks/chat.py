"""Useful tokens a second on a chat dataset: TRL's padded batches against grouping and packing.

    python -m benchmarks.chat make FOLDER [--model ID] [--cards 16GB 24GB]
    python -m benchmarks.measure FOLDER/chat.jsonl --output RECORDS.jsonl
    python -m benchmarks.chat judge FOLDER RECORDS.jsonl

The examples' lengths are a lognormal distribution (median 400 tokens, sigma 1: most short, a few very long),
cut to 50 to 4,000. The measured examples are its evenly spaced quantiles in a seeded order, so that few stand
for many; planning sees the same distribution. TRL's baseline is what its defaults do with max_length 4,096
and the largest micro-batch that fits: random batches padded to their longest, every layer checkpointed; one
that may not fit is tried too, and the better counts. The other strategies fix how examples are batched and
layers run, and leave the rest to the plan; `plan` leaves it all. Every run trains one and a half epochs after
two warm-up steps. `judge` writes benchmarks/results/chat.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from benchmarks.measured import MEASURED_ON, capped_target, environment, memory_cap_bytes, same_run
from benchmarks.referee import describe
from benchmarks.results import write_result
from launcher.measuring.profile import Profile, profile_line, read_profiles
from planner.base.errors import InputError
from planner.calibration.records import RunRecord, read_records
from planner.data.lengths import DatasetStats
from planner.gpus.target import GpuTarget
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest
from planner.setup.training_setup import TrainingSetup

MODEL = "llama-3.1-8b"
CARDS = ("16GB", "24GB")
MAX_LENGTH = 4096
EFFECTIVE_BATCH = 16
BAR = 2.0

MEDIAN_TOKENS, SIGMA = 400, 1.0
SHORTEST, LONGEST = 50, 4000
EXAMPLES = 64
"""Measured ones; four steps of the effective batch."""
PLANNED_EXAMPLES = 2000
EPOCHS = 1.5
SEED = 0

BASELINE = "trl padded"
LARGER = "trl padded, larger"
PLAN = "plan"
COMMON = {"packing": False, "kernels": "none"}
STRATEGIES: dict[str, dict[str, Any]] = {
    PLAN: {},
    "grouped": {**COMMON, "train_sampling_strategy": "group_by_length", "compile": "none"},
    "packed, sdpa": {"packing": True, "attn_implementation": "sdpa", "compile": "none"},
    "packed, flex": {"packing": True, "attn_implementation": "flex_attention", "compile": "none"},
    "packed, sdpa, compiled": {"packing": True, "attn_implementation": "sdpa", "compile": "regional"},
    "packed, flex, compiled": {
        "packing": True,
        "attn_implementation": "flex_attention",
        "compile": "regional",
    },
    "grouped, compiled": {**COMMON, "train_sampling_strategy": "group_by_length", "compile": "regional"},
}

KEPT_LEAST = {
    "gradient_checkpointing": True,
    "checkpointed_layers": None,
    "selective_checkpointing": False,
    "activation_memory_budget": None,
}
NOT_PLANNED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed, flex, compiled": ("packed, sdpa, compiled", {"attn_implementation": "flex_attention"}),
    "grouped, compiled": ("grouped", {"compile": "regional"}),
}
"""Strategies whose memory may not be modelled: another's setup, every layer checkpointed."""
UNSURE = (LARGER, *NOT_PLANNED)


def lengths(count: int) -> tuple[int, ...]:
    """Lengths of so many examples in a seeded order."""
    normal = NormalDist(math.log(MEDIAN_TOKENS), SIGMA)
    drawn = [math.exp(normal.inv_cdf((index + 0.5) / count)) for index in range(count)]
    cut = [min(LONGEST, max(SHORTEST, round(length))) for length in drawn]
    random.Random(SEED).shuffle(cut)
    return tuple(cut)


def statistics(drawn: Sequence[int]) -> DatasetStats:
    """What planning is told of examples of these lengths."""
    return DatasetStats(
        lengths=tuple(sorted(Counter(drawn).items())),
        loss_tokens=sum(drawn),
        loss_on="all",
        data_format="messages",
        estimated=False,
    )


def setups(model: str, target: GpuTarget) -> dict[str, TrainingSetup]:
    """The setup of each strategy that can be run, the baseline first."""
    planned = {BASELINE: _baseline(model, target)}
    for name, knobs in STRATEGIES.items():
        planned[name] = _plan(model, target, knobs)
    found = {name: setup for name, setup in planned.items() if setup is not None}
    if BASELINE in found:
        size = 2 * found[BASELINE].per_device_train_batch_size
        if EFFECTIVE_BATCH % size == 0:
            found[LARGER] = found[BASELINE].replace(
                per_device_train_batch_size=size, gradient_accumulation_steps=EFFECTIVE_BATCH // size
            )
    for name, (like, changes) in NOT_PLANNED.items():
        if name not in found and like in found:
            found[name] = found[like].replace(**KEPT_LEAST, **changes)
    return found


def _plan(model: str, target: GpuTarget, knobs: dict[str, Any]) -> TrainingSetup | None:
    request = PlanRequest(
        model=model,
        gpu=MEASURED_ON,
        knobs=(("max_length", MAX_LENGTH), *knobs.items()),
        effective_batch_size=EFFECTIVE_BATCH,
    )
    try:
        found = make_plan(request, stats=statistics(lengths(PLANNED_EXAMPLES)), target=target)
    except InputError as error:
        print(f"  no plan: {error}")
        return None
    # The default attention of these models, named or not, is one setup.
    named = found.setup.attn_implementation
    setup = found.setup.replace(attn_implementation=None) if named == "sdpa" else found.setup
    return setup if found.fits else None


def _baseline(model: str, target: GpuTarget) -> TrainingSetup | None:
    """TRL's defaults at the largest micro-batch that fits."""
    for size in (16, 8, 4, 2, 1):
        knobs = {
            **COMMON,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": EFFECTIVE_BATCH // size,
            "train_sampling_strategy": "random",
            "compile": "none",
            "gradient_checkpointing": True,
            "optim": "adamw_torch_fused",
        }
        found = _plan(model, target, knobs)
        if found is not None:
            return found
    return None


def profile(setup: TrainingSetup, usable_bytes: int) -> Profile:
    """The run that measures a setup on the examples."""
    drawn = lengths(EXAMPLES)
    per_step = float(setup.effective_batch_size)
    if setup.packing:
        per_step *= EXAMPLES / statistics(drawn).packing(setup.max_length).sequences
    # What lies outside the allocator depends on neither.
    like = setup.replace(**KEPT_LEAST, attn_implementation=None, compile="none")
    return Profile(
        setup=setup,
        steps=max(3, math.ceil(EPOCHS * EXAMPLES / per_step)),
        memory_cap_bytes=memory_cap_bytes(like, usable_bytes),
        lengths=drawn,
    )


def make(folder: Path, model: str, cards: Sequence[str]) -> None:
    """Write chat.jsonl, and strategies.json that names its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    named: list[dict[str, Any]] = []
    for card in cards:
        target = capped_target(card)
        print(f"{model} {card}")
        known: dict[str, str] = {}
        for name, setup in setups(model, target).items():
            one = profile(setup, target.usable_bytes)
            line = profile_line(one)
            same = known.setdefault(line, name)
            print(f"  {name}: {_describe(setup)}, {one.steps} steps" + (f", as {same}" * (same != name)))
            named.append({"card": card, "strategy": name, "profile": json.loads(line), "first": same == name})
    # What may run out of memory, or compile for long, comes last.
    named.sort(key=lambda one: (one["strategy"] in UNSURE, one["profile"]["compile"] != "none"))
    text = "".join(json.dumps(one["profile"]) + "\n" for one in named if one["first"])
    (folder / "chat.jsonl").write_text(text, encoding="utf-8")
    (folder / "strategies.json").write_text(json.dumps(named, indent=1), encoding="utf-8")


def _describe(setup: TrainingSetup) -> str:
    batching = "packed" if setup.packing else setup.train_sampling_strategy
    attention = setup.attn_implementation or "default attention"
    return f"{batching}, {attention}, accumulated {setup.gradient_accumulation_steps}, {describe(setup)}"


def rows(
    named: Sequence[dict[str, Any]], profiles: Sequence[Profile], records: Sequence[RunRecord]
) -> list[dict[str, Any]]:
    """A row for each strategy and card that was measured, with its rate over the baseline's."""
    found = []
    for one, profile_ in zip(named, profiles, strict=True):
        own = [record for record in records if same_run(profile_, record)]
        if own:
            rate = own[-1].useful_tokens_per_second
            found.append(
                {
                    "card": one["card"],
                    "strategy": one["strategy"],
                    "setup": _describe(profile_.setup),
                    "outcome": own[-1].outcome,
                    "useful_tokens_per_second": rate and round(rate, 1),
                    "tokens_per_second": own[-1].tokens_per_second and round(own[-1].tokens_per_second, 1),
                    "step_seconds": list(own[-1].step_seconds),
                }
            )
    for row in found:
        over, rate = _baseline_rate(found, row["card"]), row["useful_tokens_per_second"]
        row["over_baseline"] = round(rate / over, 3) if over and rate else None
    return found


def _baseline_rate(found: Sequence[dict[str, Any]], card: str) -> float | None:
    """The better of the two, where the larger micro-batch ran."""
    rates = [
        row["useful_tokens_per_second"]
        for row in found
        if row["card"] == card and row["outcome"] == "ok" and row["strategy"] in (BASELINE, LARGER)
    ]
    return max(rates, default=None)


def judge(folder: Path, records: Sequence[RunRecord]) -> None:
    """Print the table and write the result."""
    named = json.loads((folder / "strategies.json").read_text(encoding="utf-8"))
    lines = folder / ".strategies.jsonl"
    lines.write_text("".join(json.dumps(one["profile"]) + "\n" for one in named), encoding="utf-8")
    profiles = read_profiles(lines)
    lines.unlink()
    found = rows(named, profiles, records)
    for row in found:
        rate = row["useful_tokens_per_second"] or row["outcome"]
        over = f"{row['over_baseline']}x {BASELINE}"
        print(f"{row['card']:5s} {row['strategy']:24s} {rate} useful tokens/s, {over}  ({row['setup']})")
    measured = [record for record in records if any(same_run(one, record) for one in profiles)]
    drawn = lengths(EXAMPLES)
    write_result(
        "chat",
        {
            "bar_over_baseline": BAR,
            "lengths": {"count": EXAMPLES, "mean": round(sum(drawn) / EXAMPLES, 1), "max": max(drawn)},
            "max_length": MAX_LENGTH,
            "effective_batch_size": EFFECTIVE_BATCH,
            "model": profiles[0].setup.model,
            "environment": environment(measured),
            "rows": found,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path, nargs="?")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--cards", nargs="+", default=CARDS)
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.folder, arguments.model, arguments.cards)
    else:
        judge(arguments.folder, tuple(read_records(arguments.records)))


if __name__ == "__main__":
    main()
