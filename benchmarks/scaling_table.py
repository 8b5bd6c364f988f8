"""What the throughput model says of more GPUs than were measured: the table of docs/several-gpus.md."""

from __future__ import annotations

from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate, estimate_step

MODEL = "llama-3.1-8b"
COUNTS = (2, 4, 8, 16)
CARDS = ("h200", "rtx-4090")
_HEAD = "| GPUs | " + " | ".join(f"{card}, {way}" for card in CARDS for way in ("DDP", "FSDP2")) + " |\n"


def table() -> str:
    """Tokens a second of all GPUs with their interval, and how many times one's that is, as Markdown."""
    rows = [_HEAD, "|---" * (1 + 2 * len(CARDS)) + "|\n"]
    for count in COUNTS:
        cells = [_cell(step(card, count, way)) for card in CARDS for way in ("ddp", "fsdp")]
        rows.append(f"| {count} | {' | '.join(cells)} |\n")
    return "".join(rows)


def step(card: str, count: int, distributed: str) -> StepEstimate:
    """The forecast of the table's setup on so many of a card."""
    setup = TrainingSetup(
        model=MODEL,
        max_length=2048,
        per_device_train_batch_size=4,
        num_processes=count,
        distributed=distributed,
        optim="adamw_torch_fused",
    )
    return estimate_step(TrainingRun(setup=setup, model=load_shipped(MODEL)), gpu_catalog().get(card))


def _cell(found: StepEstimate) -> str:
    if found.sharing is None:
        raise AssertionError("a run on several GPUs has no word of what they share")
    interval = f"{found.tokens_per_second_low:,.0f} to {found.tokens_per_second_high:,.0f}"
    return f"{found.tokens_per_second:,.0f} ({interval}), {found.sharing.scaling:.2f}x"
