"""The page docs/cookbook.md: `python -m benchmarks.cookbook`, what each size of card trains, by the tool.

Each row is what the command in it prints: the plan of a model for a card of that size.
"""

from __future__ import annotations

from planner.answers.plan import Plan
from planner.gpus.parse import REFERENCE_CARDS
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.text.figures import duration, gib, rate

ROWS: tuple[tuple[int, str, str], ...] = (
    (8, "llama-3.2-1b", "lora"),
    (8, "llama-3.2-3b", "qlora"),
    (8, "qwen2.5-7b", "qlora"),
    (12, "llama-3.2-3b", "lora"),
    (12, "llama-3.1-8b", "qlora"),
    (16, "llama-3.1-8b", "qlora"),
    (16, "qwen2.5-14b", "qlora"),
    (24, "llama-3.1-8b", "lora"),
    (24, "qwen2.5-14b", "qlora"),
    (24, "qwen3-30b-a3b", "qlora"),
    (32, "qwen2.5-14b", "qlora"),
    (32, "qwen2.5-32b", "qlora"),
    (48, "qwen2.5-32b", "qlora"),
    (48, "llama-3.1-70b", "qlora"),
    (80, "llama-3.1-8b", "lora"),
    (80, "qwen2.5-32b", "qlora"),
    (80, "llama-3.1-70b", "qlora"),
)
"""Size in GB, model, method: what people ask for on such a card, and the next larger one."""
_HEAD = """| model | method | tokens | batch | needs at most | tokens/s | a million tokens |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table() -> str:
    """A section for each size, with a row for each model."""
    parts = []
    for size in dict.fromkeys(size for size, *_ in ROWS):
        rows = "".join(_row(size, model, method) for one, model, method in ROWS if one == size)
        parts.append(f"## {size} GB\n\nPlanned for `{REFERENCE_CARDS[size]}`.\n\n{_HEAD}{rows}\n")
    return "".join(parts)


def _row(size: int, model: str, method: str) -> str:
    plan = make_plan(make_request(model, gpu=f"{size}GB", knobs={"method": method}), whole=False)
    command = f"`plan {model} {size}GB --method {method}`"
    needed = f"{gib(plan.memory.peak_upper_bytes)} of {gib(plan.gpu.usable_bytes)}"
    if not plan.fits:
        return f"| {command} | {method} | does not fit | | {needed} | | |\n"
    setup = plan.setup
    batch = f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"
    return f"| {command} | {method} | {setup.max_length:,} | {batch} | {needed} | {_speed(plan)} |\n"


def _speed(plan: Plan) -> str:
    speed, time = plan.speed, plan.duration
    if speed is None or time is None:
        return "no forecast | "
    low, high = rate(speed.tokens_per_second_low), rate(speed.tokens_per_second_high)
    return f"{rate(speed.tokens_per_second)} ({low} to {high}) | {duration(time.hours)}"


if __name__ == "__main__":
    print(table())
