"""Answers to trainers' configs as text."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from planner.text.figures import bullets, gib, heading, pairs, rate
from planner.trainers.answer import ConfigAnswer

_LEAST_SHARE = 0.05
"""Share of the memory from which a part is named."""


def print_config(out: Console, answer: ConfigAnswer) -> None:
    """Print what a config needs, whether that fits, what decides it, what to change and what was not used."""
    config, memory, setup = answer.config, answer.estimate.memory, answer.config.setup
    usable = answer.target.usable_bytes
    fits = answer.estimate.fits
    verdict = Text("fits" if fits else "does not fit", style="green" if fits else "red")
    title = f"{answer.trainer.title} {answer.trainer.version}"
    out.print(Text(f"{answer.path}, for {title} on {answer.target.text.strip()}: "), verdict, end="\n")
    speed = answer.estimate.speed
    rows = [
        ("model", f"{setup.model}, {setup.method}, {setup.max_length:,} tokens"),
        (
            "batch",
            f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"
            + (f" on {setup.num_processes} GPUs ({setup.distributed})" if setup.num_processes > 1 else ""),
        ),
        (
            "memory",
            f"{gib(memory.peak_bytes)}, at most {gib(memory.peak_upper_bytes)} of {gib(usable)}",
        ),
        (
            "tokens/s",
            "no forecast" if speed is None else f"about {rate(speed.tokens_per_second)}, with TRL's kernels",
        ),
    ]
    pairs(out, rows)
    heading(out, "What decides")
    parts = sorted(memory.components, key=lambda part: -part.size_bytes)
    least = _LEAST_SHARE * memory.process_bytes
    pairs(out, [(part.title, gib(part.size_bytes)) for part in parts if part.size_bytes >= least])
    if not fits:
        heading(out, "What to change")
        bullets(out, _changes(answer))
    if config.notes:
        heading(out, "Counted otherwise")
        bullets(out, config.notes)
    heading(out, "Settings that were not used")
    bullets(out, [", ".join(config.unused) or "none"])


def _changes(answer: ConfigAnswer) -> list[str]:
    found = []
    for change in answer.changes:
        settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in change.settings)
        ends = "fits" if change.fits else "does not fit yet"
        found.append(f"{settings} - then at most {gib(change.peak_upper_bytes)}, {ends}")
    return found or ["nothing that was tried makes it smaller: a card with more memory, or a smaller model"]


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
