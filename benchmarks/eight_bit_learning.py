"""What products in 8 bits cost in learning: losses with exact products, beside the spread of seeds.

    python -m benchmarks.eight_bit_learning MODEL_DIR --tokens ROWS.npz [--seeds 3]
        [--modes bf16,fp8_backward,fp8] [--steps 240] [--output FILE.json]

MODEL_DIR has a real model: safetensors, or one GGUF file, which is turned into safetensors in bfloat16 first
(needs the package gguf). ROWS.npz has `train` and `held`, rows of token ids; where there is no such file it
is written: documentation strings of this Python's installed packages, 256 tokens a row, one file in ten held
out. A process trains each mode (benchmarks.eight_bit, `learn`), all side by side on one GPU, with the same
rows, orders and first adapters; on a CPU one after the other. Bars: the mean of `fp8_backward` within the
spread of the seeds of bf16, that of `fp8` within twice the spread. Lines are kept beside the output
(FILE.jsonl), and seeds that they have are not trained again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.eight_bit import STEPS, WAYS
from benchmarks.results import FOLDER, machine

BASE = "bf16"
BARS = {"fp8_backward": 1.0, "fp8": 2.0}
"""How many spreads of the seeds of bf16 a mode's mean may lie above theirs."""
ROW_TOKENS, TRAIN_ROWS, HELD_ROWS = 256, 4800, 192
LEAST_CHARACTERS, MOST_CHARACTERS = 200, 2000
"""Of a documentation string that is taken, and that is kept of it."""


def judged(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Modes beside bf16, seed by seed, and whether each lies within its bar.

    `above` is the mean over seeds of the difference to the same seed in bf16; `spread` the largest less the
    smallest of the seeds of bf16. Modes without a bar have no verdict, nor has any without a spread.
    """
    exact: dict[str, dict[int, float]] = {}
    for line in lines:
        exact.setdefault(line["way"], {})[line["seed"]] = line["exact"]
    base = exact.get(BASE, {})
    spread = max(base.values()) - min(base.values()) if len(base) > 1 else None
    found: dict[str, Any] = {}
    for mode, losses in exact.items():
        shared = sorted(losses.keys() & base.keys())
        above = statistics.fmean(losses[seed] - base[seed] for seed in shared) if shared else None
        bar = BARS.get(mode)
        known = spread is not None and above is not None and bar is not None
        found[mode] = {
            "exact": {str(seed): losses[seed] for seed in sorted(losses)},
            "mean": statistics.fmean(losses.values()),
            "above": above,
            "spreads_above": above / spread if known and spread else None,
            "within_the_bar": above <= bar * spread if known else None,
        }
    return {"spread": spread, "modes": found}


def learn(
    model: Path, tokens: Path, modes: Sequence[str], seeds: int, steps: int, lines: Path, *, at_once: bool
) -> None:
    """Train what `lines` has not yet, a process a mode.

    Raises:
        SystemExit: a process ended by an error; what the others wrote is kept.
    """
    done = {(line["way"], line["seed"], line["steps"]) for line in _read(lines)}
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    for mode in modes:
        wanted = [str(seed) for seed in range(1, seeds + 1) if (mode, seed, steps) not in done]
        if not wanted:
            continue
        command = [sys.executable, "-m", "benchmarks.eight_bit", "learn", str(lines), "--model", str(model)]
        command += ["--tokens", str(tokens), "--way", mode, "--steps", str(steps), "--seeds", *wanted]
        process = subprocess.Popen(command)
        running.append((mode, process))
        if not at_once:
            process.wait()
    failed = [mode for mode, process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"these modes ended by an error: {', '.join(failed)}")


def _read(lines: Path) -> list[dict[str, Any]]:
    if not lines.exists():
        return []
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def with_safetensors(folder: Path, made: Path) -> Path:
    """The folder, or `made` with its GGUF file's model as safetensors in bfloat16.

    Raises:
        SystemExit: it has neither.
    """
    if list(folder.glob("*.safetensors")):
        return folder
    files = list(folder.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{folder}: has no safetensors, and {len(files)} GGUF files where one is needed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.bfloat16)
    # What transformers remembers of the file's own quantisation would be saved with the weights.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name).save_pretrained(made)
    return made


def write_rows(model: Path, tokens: Path) -> None:
    """Write rows of token ids of installed packages' documentation strings, the tokenizer `model`'s."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts: dict[str, list[str]] = {"train": [], "held": []}
    seen: set[str] = set()
    for path in _sources():
        # By the file, so that what is held out shares no file with what is learned.
        part = "held" if hashlib.sha256(path.name.encode()).digest()[0] < 26 else "train"
        for text in _documented(path):
            if text[-300:] not in seen:
                seen.add(text[-300:])
                texts[part].append(text)
    rows = {}
    for part, count in (("train", TRAIN_ROWS), ("held", HELD_ROWS)):
        random.Random(0).shuffle(texts[part])
        ids: list[int] = []
        for text in texts[part]:
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= count * ROW_TOKENS:
                break
        whole = min(count, len(ids) // ROW_TOKENS)
        rows[part] = np.array(ids[: whole * ROW_TOKENS], dtype=np.uint32).reshape(whole, ROW_TOKENS)
    np.savez_compressed(tokens, **rows)


def _sources() -> list[Path]:
    found = {
        Path(str(one.locate_file(file)))
        for one in distributions()
        for file in one.files or ()
        if file.suffix == ".py"
    }
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered[:3000]


def _documented(path: Path) -> list[str]:
    """Signatures and documentation strings of a file's classes and functions; none where it has no syntax."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node) or ""
        if len(text) >= LEAST_CHARACTERS:
            found.append(f"{node.name}:\n{text[:MOST_CHARACTERS]}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--tokens", type=Path, required=True, metavar="ROWS.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", default=f"{BASE},fp8_backward,fp8")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=FOLDER / "eight_bit_learning.json")
    arguments = parser.parse_args()
    modes = arguments.modes.split(",")
    unknown = sorted(set(modes) - set(WAYS))
    if unknown:
        parser.error(f"unknown modes: {', '.join(unknown)}; known are {', '.join(WAYS)}")
    lines = arguments.output.with_suffix(".jsonl")
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = with_safetensors(arguments.model, Path(folder))
        if not arguments.tokens.exists():
            write_rows(model, arguments.tokens)
        learn(
            model,
            arguments.tokens,
            modes,
            arguments.seeds,
            arguments.steps,
            lines,
            at_once=torch.cuda.is_available(),
        )
    kept = [line for line in _read(lines) if line["steps"] == arguments.steps]
    figures = {
        "model": arguments.model.name,
        "steps": arguments.steps,
        "tokens": {name: list(rows.shape) for name, rows in np.load(arguments.tokens).items()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        **judged(kept),
        "runs": kept,
        "machine": machine(),
    }
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: figures[name] for name in ("spread", "modes")}, indent=1))


if __name__ == "__main__":
    main()
