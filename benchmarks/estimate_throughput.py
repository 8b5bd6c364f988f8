"""Wall time of `vramwise estimate` on 20,000 distinct setups: `python -m benchmarks.estimate_throughput`.

Writes benchmarks/results/estimate_throughput.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import write_result

SETUPS = 20_000
SEED = 7
BAR_SECONDS = 10.0
MODELS = (
    "qwen2.5-14b",
    "llama-3.1-8b",
    "mistral-nemo-12b",
    "gemma-2-9b",
    "phi-4",
    "qwen3-30b-a3b",
    "smollm2-135m",
)


def setups(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Endless setups drawn at random, so that hardly two share a length."""
    while True:
        setup = {
            "model": rng.choice(MODELS),
            "method": rng.choice(("qlora", "lora", "full")),
            "max_length": rng.randint(64, 8192),
            "per_device_train_batch_size": rng.randint(1, 8),
            "gradient_accumulation_steps": rng.choice((1, 2, 4, 8, 16)),
            "gradient_checkpointing": rng.random() < 0.5,
            "optim": rng.choice(("paged_adamw_8bit", "adamw_torch", "adafactor", "sgd")),
        }
        if setup["method"] != "full":
            setup |= {"lora_r": rng.choice((8, 16, 32, 64, 128)), "lora_dropout": rng.choice((0.0, 0.05))}
        yield setup


def distinct_lines() -> list[str]:
    """SETUPS setups as JSON lines, no two alike."""
    lines: dict[str, None] = {}
    for setup in setups(random.Random(SEED)):
        lines[json.dumps(setup)] = None
        if len(lines) == SETUPS:
            return list(lines)
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vramwise", type=Path, default=Path(sys.executable).with_name("vramwise"))
    program = parser.parse_args().vramwise
    asked = distinct_lines()
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(line + "\n" for line in asked)
        file.flush()
        command = [str(program), "estimate", "--gpu", "rtx-4090", "--setups", file.name, "--json"]
        start = time.perf_counter()
        answers = subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines()
        seconds = time.perf_counter() - start
    assert len(answers) == SETUPS
    refused = [answer for answer in answers if answer.startswith('{"error"')]
    assert not refused, refused[0]
    write_result(
        "estimate_throughput",
        {"setups": SETUPS, "models": len(MODELS), "seconds": round(seconds, 2), "bar_seconds": BAR_SECONDS},
    )
    print(f"{SETUPS} distinct setups of {len(MODELS)} models in {seconds:.2f} s, bar {BAR_SECONDS} s")
    return int(seconds > BAR_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
