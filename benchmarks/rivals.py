"""One GPU, one contender after the other: TRL as guides use it, vramwise's plan, Unsloth.

    python -m benchmarks.rivals run RESULTS.jsonl --unsloth-site FOLDER [--caps 12GB 16GB] [--seconds N]
    python -m benchmarks.rivals judge RESULTS.jsonl

All train the same random tokens on the shapes of Llama-3.1-8B with random weights, QLoRA of rank 16 on all
linear layers, 2,048 tokens, effective batch 16, under the same memory cap, each in a process of its own. What
the cap leaves of the card is held by an allocation outside torch's: libraries that ask the driver how much is
free see no more than on the smaller card. Rates are wall time between the ends of optimizer steps after
warm-up. Unsloth runs in its own stack (`--unsloth-site`: a folder for PYTHONPATH with the wheels that
README.md lists) with what its notebooks set, at the micro-batches of `--micro-batches` until memory runs out;
the best counts. `--padding-choice` is its UNSLOTH_PADDING_CHOICE: padded compiles whole layers. Started again
with the same file, `run` goes on where it was. `judge` writes benchmarks/results/rivals.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import MEASURED_ON, capped_target, memory_cap_bytes
from benchmarks.referee import describe
from benchmarks.results import write_result
from launcher.runs.allocator import measuring_environment
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest

MODEL = "llama-3.1-8b"
CAPS = ("12GB", "16GB", "24GB", "80GB")
CONTENDERS = ("vramwise", "unsloth", "trl")
MAX_LENGTH = 2048
EFFECTIVE_BATCH = 16
WARM_UP_STEPS = 1
TIMED_STEPS = 2
MICRO_BATCHES = (1, 2, 4, 8, 16)
EXPECTED_SECONDS = {"trl": 55, "vramwise": 60, "unsloth": 40, "checkpoint": 40}
SECONDS_A_MICRO_BATCH = 28
"""No child is started with less time left: 45 s for vramwise's with compilation, Unsloth's by micro-batch."""
CHILD_SECONDS = {"trl": 120, "vramwise": 180, "unsloth": 400, "checkpoint": 120}
"""After which a child is ended."""
BARS = {
    "trl": dict.fromkeys(CAPS, 1.5),
    "unsloth": {"12GB": 1.0, "16GB": 1.0, "24GB": 1.1, "80GB": 1.3},
}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def tasks(
    caps: Sequence[str],
    *,
    checkpoint: Path,
    device: str = "cuda",
    padding_choice: str = "auto",
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> Iterator[dict[str, Any]]:
    """What is to run for each cap: the contenders in turn, the plan's setup and cap in each."""
    for card in caps:
        target = capped_target(MEASURED_ON if card == "80GB" else card)
        request = PlanRequest(
            model=MODEL,
            gpu=MEASURED_ON,
            knobs=(("max_length", MAX_LENGTH), ("lora_alpha", 32)),
            effective_batch_size=EFFECTIVE_BATCH,
        )
        plan = make_plan(request, target=target)
        shared = {
            "model": MODEL,
            "card": card,
            "device": device,
            "usable_bytes": target.usable_bytes,
            "memory_cap_bytes": memory_cap_bytes(plan.setup, target.usable_bytes),
            "max_length": MAX_LENGTH,
            "effective_batch_size": EFFECTIVE_BATCH,
            "warm_up_steps": WARM_UP_STEPS,
            "steps": WARM_UP_STEPS + TIMED_STEPS,
        }
        yield {**shared, "kind": "vramwise", "setup": plan.setup.to_dict(), "described": describe(plan.setup)}
        yield {
            **shared,
            "kind": "unsloth",
            "checkpoint": str(checkpoint),
            "micro_batches": list(micro_batches),
            "padding_choice": padding_choice,
        }
        yield {**shared, "kind": "trl"}


def remaining(task: dict[str, Any], done: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """A task without what was measured already; None when nothing is left of it."""
    own = [one for one in done if (one["contender"], one["card"]) == (task["kind"], task["card"])]
    if task["kind"] != "unsloth":
        return None if own else task
    own = [one for one in own if one.get("padding_choice", "auto") == task["padding_choice"]]
    ended = any(one["outcome"] != "ok" for one in own)
    left = [
        size
        for size in task["micro_batches"]
        if all(one["per_device_train_batch_size"] != size for one in own)
    ]
    return None if ended or not left else {**task, "micro_batches": left}


def run(output: Path, asked: Sequence[dict[str, Any]], *, unsloth_site: Path | None, seconds: float) -> None:
    """Run what is left of the tasks, a child each, and append its lines as they come."""
    end = time.monotonic() + seconds
    for task in asked:
        left = remaining(task, _read(output))
        kind, card = task["kind"], task["card"]
        if left is None or (kind == "unsloth" and unsloth_site is None):
            continue
        needed = EXPECTED_SECONDS[kind] + SECONDS_A_MICRO_BATCH * len(left.get("micro_batches", ()))
        if kind == "unsloth" and not Path(task["checkpoint"]).is_dir():
            needed += EXPECTED_SECONDS["checkpoint"]
        if time.monotonic() + needed > end:
            print(f"no time is left for {kind} at {card}", flush=True)
            return
        if kind == "unsloth" and not Path(task["checkpoint"]).is_dir():
            _child("checkpoint", left, output, None, end)
        _child(kind, left, output, unsloth_site if kind == "unsloth" else None, end)


def _child(kind: str, task: dict[str, Any], output: Path, site: Path | None, end: float) -> None:
    environment = {**os.environ, **OFFLINE}
    if kind == "vramwise":
        environment = measuring_environment(environment)
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    command = [sys.executable, "-m", "benchmarks.rival_child", kind, json.dumps(task)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment["UNSLOTH_COMPILE_LOCATION"] = folder
        log = Path(folder) / "log"
        with log.open("wb") as errors, output.open("a", encoding="utf-8") as lines:
            # Its own output goes to a file as well, so that what it measured before an end is kept.
            said = Path(folder) / "said"
            with said.open("wb") as out:
                child = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
                limit = min(CHILD_SECONDS[kind], end - begun)
                try:
                    code = child.wait(timeout=limit)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                    code = -1
            measured = [line for line in said.read_text(errors="replace").splitlines() if _is_measured(line)]
            tail = log.read_text(errors="replace")[-1500:]
            cut_off = code == -1 and limit < CHILD_SECONDS[kind]
            if code != 0 and kind != "checkpoint" and not cut_off:
                what = "took too long" if code == -1 else f"ended with code {code}"
                failed = {
                    "contender": kind,
                    "card": task["card"],
                    "outcome": "error",
                    "message": what + ": " + tail,
                }
                measured.append(json.dumps({**failed, "per_device_train_batch_size": None}))
            for line in measured:
                lines.write(line + "\n")
                print(kind, task["card"], line[:400], flush=True)
    print(f"{kind} at {task['card']}: {time.monotonic() - begun:.0f} s, code {code}", flush=True)
    if code != 0:
        print(tail, flush=True)


def _is_measured(line: str) -> bool:
    return line.startswith('{"contender"')


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def compare(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a cap: each contender's best rate, and the plan's rate over the others' beside the bars."""
    rows = []
    for card in CAPS:
        best: dict[str, dict[str, Any]] = {}
        for one in measured:
            rate, kind = one.get("tokens_per_second"), one["contender"]
            if one["card"] == card and rate and rate > best.get(kind, {}).get("tokens_per_second", 0.0):
                best[kind] = one
        if not best:
            continue
        own = best.get("vramwise", {}).get("tokens_per_second")
        row: dict[str, Any] = {"card": card}
        for kind in CONTENDERS:
            found = best.get(kind)
            row[kind] = found and {
                "tokens_per_second": found["tokens_per_second"],
                "per_device_train_batch_size": found["per_device_train_batch_size"],
                "setup": found["setup"],
                "allocated_bytes": found["allocated_bytes"],
                "reserved_bytes": found["reserved_bytes"],
            }
            if kind in BARS and found and own:
                row[f"over_{kind}"] = round(own / found["tokens_per_second"], 3)
                row[f"bar_over_{kind}"] = BARS[kind][card]
        rows.append(row)
    return rows


def judge(path: Path) -> None:
    """Print a line a cap and write the result with every contender's environment."""
    measured = _read(path)
    rows = compare(measured)
    for row in rows:
        rates = ", ".join(
            f"{kind} {row[kind]['tokens_per_second']:,.0f} (batch {row[kind]['per_device_train_batch_size']})"
            for kind in CONTENDERS
            if row[kind]
        )
        ratios = ", ".join(
            f"{row[f'over_{kind}']:.2f}x {kind} (bar {row[f'bar_over_{kind}']})"
            for kind in BARS
            if f"over_{kind}" in row
        )
        print(f"{row['card']}: {rates}; {ratios}")
    environments = {
        one["contender"]: {key: one[key] for key in ("gpu", "cuda", "driver", "python", "versions")}
        for one in measured
        if "versions" in one
    }
    write_result(
        "rivals",
        {
            "model": MODEL,
            "max_length": MAX_LENGTH,
            "effective_batch_size": EFFECTIVE_BATCH,
            "rows": rows,
            "environments": environments,
            "measured": [
                {key: value for key, value in one.items() if key not in ("versions", "gpu", "cuda", "python")}
                for one in measured
            ],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "judge"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--unsloth-site", type=Path)
    parser.add_argument("--caps", nargs="+", choices=CAPS, default=CAPS)
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "llama-3.1-8b-nf4")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", choices=CONTENDERS)
    parser.add_argument("--padding-choice", choices=("auto", "padded", "padding_free"), default="auto")
    parser.add_argument("--micro-batches", nargs="+", type=int, choices=MICRO_BATCHES, default=MICRO_BATCHES)
    arguments = parser.parse_args()
    if arguments.what == "judge":
        judge(arguments.results)
        return
    asked = [
        task
        for task in tasks(
            arguments.caps,
            checkpoint=arguments.checkpoint,
            padding_choice=arguments.padding_choice,
            micro_batches=arguments.micro_batches,
        )
        if arguments.only in (None, task["kind"])
    ]
    run(arguments.results, asked, unsloth_site=arguments.unsloth_site, seconds=arguments.seconds)


if __name__ == "__main__":
    main()
