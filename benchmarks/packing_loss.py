"""Does packing or grouping change what is learned? Loss of the demo model after 200 steps, four ways.

    python -m benchmarks.packing_loss [--attention flex_attention] [--method qlora] [--steps N]

The demo's examples are joined to conversations of one to five exchanges, most of them short. The demo model
learns them in random padded batches, in packed rows, in padded batches of the very examples that each step's
packed rows hold ("composed"), and in groups of like length, with several seeds each and as many examples an
optimizer step (packed rows: on average); an epoch has about 60 steps. The mean loss of
the last 50 with packing or grouping is to differ from that of padded batches by less than seeds do. A step's
loss is the mean over its tokens, and steps have more or fewer tokens, so the mean over the tokens of those
steps stands beside the mean over the steps. `before_training` is the loss over the whole data in each kind of
batches before the first step, which is the same to seven digits.

Runs on the GPU where there is one (flex attention needs it), else on the CPU. Writes
benchmarks/results/packing_loss.json.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.results import write_result
from launcher.runs.training_job import TrainingJob
from launcher.training import build, dataset
from planner.base.data_files import PROFILES
from planner.data.reader import Conversation, TrainingData
from planner.setup.training_setup import TrainingSetup

MODEL, DATA = PROFILES / "demo" / "model", PROFILES / "demo" / "data" / "train.jsonl"
CONVERSATIONS, MOST_EXCHANGES = 800, 5
LN_2 = 0.6931
MAX_LENGTH, ROWS = 256, 5
"""Five packed rows hold 12.94 examples: as many as 13 padded ones, within half a percent."""
STEPS, LAST = 200, 50
SEEDS = (1, 2)
IGNORED = -100


def conversations() -> TrainingData:
    """The demo's exchanges joined to conversations; half have one, a quarter two, and so on."""
    shown = dataset.read_dataset(DATA)
    generator = random.Random(0)
    found = []
    for _ in range(CONVERSATIONS):
        turns = min(MOST_EXCHANGES, 1 + int(generator.expovariate(LN_2)))
        parts = [generator.choice(shown.examples) for _ in range(turns)]
        found.append(
            Conversation(tuple(m for part in parts if isinstance(part, Conversation) for m in part.messages))
        )
    return TrainingData(format=shown.format, examples=tuple(found), source="the demo's, joined")


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """One run: loss over all data before it, and each step's loss and tokens in the loss."""

    before: float
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    def last(self) -> dict[str, float]:
        """Mean loss of the last steps, over steps and over their tokens."""
        losses, tokens = self.losses[-LAST:], self.tokens[: len(self.losses)][-LAST:]
        weighted = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
        return {"over_steps": sum(losses) / len(losses), "over_tokens": weighted / sum(tokens)}


class _CountingCollator:
    """The trainer's collator, noting the tokens in the loss of each batch."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self.tokens: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self._collator(examples)
        self.tokens.append(int((batch["labels"][:, 1:] != IGNORED).sum()))
        return batch


class _Unpacking:
    """Collates the examples of packed rows with another trainer's collator, padded."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self._collator([example for row in rows for example in _examples(row)])


def _examples(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The examples in a packed row, in their order."""
    start = 0
    for length in row["seq_lengths"]:
        yield {k: v[start : start + length] for k, v in row.items() if k != "seq_lengths" and v is not None}
        start += length


def train(
    setup: TrainingSetup, seed: int, steps: int, data: TrainingData, padded: TrainingSetup | None = None
) -> Learned:
    """Train and note the loss of each step; with `padded` its packed rows in padded batches."""
    with tempfile.TemporaryDirectory() as folder:
        collator = None if padded is None else _trainer(padded, seed, steps, data, Path(folder)).data_collator
        trainer = _trainer(setup, seed, steps, data, Path(folder))
        if collator is not None:
            trainer.data_collator = _Unpacking(collator)
        before = _loss_of_all(trainer)
        counter = _CountingCollator(trainer.data_collator)
        trainer.data_collator = counter
        trainer.train()
        losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    return Learned(before=before, losses=losses, tokens=tuple(counter.tokens))


def _trainer(setup: TrainingSetup, seed: int, steps: int, data: TrainingData, folder: Path) -> Any:
    on_gpu = torch.cuda.is_available()
    job = TrainingJob(
        setup=setup,
        model_source=str(MODEL),
        data_path=str(DATA),
        max_steps=steps,
        seed=seed,
        logging_steps=1,
    )
    tokenizer = build.load_tokenizer(str(MODEL), allow_download=False)
    torch.manual_seed(seed)
    return build.build_trainer(
        setup,
        job,
        model=build.load_model(
            setup,
            str(MODEL),
            device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
            allow_download=False,
        ),
        tokenizer=tokenizer,
        train_dataset=dataset.to_trl_dataset(data, tokenizer, max_length=setup.max_length),
        eval_dataset=None,
        output_dir=folder,
        on_gpu=on_gpu,
    )


def _loss_of_all(trainer: Any) -> float:
    """Mean loss over all tokens of the data, batched as in training."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(trainer.compute_loss(trainer.model, dict(batch))) * tokens
            count += tokens
    return total / count


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train each way and compare the mean of the last steps."""
    data = conversations()
    stats = dataset.measure_stats(data, build.load_tokenizer(str(MODEL), allow_download=False))
    per_row = stats.examples / stats.packing(MAX_LENGTH).sequences
    effective = round(ROWS * per_row)
    padded = TrainingSetup(
        model="demo",
        max_length=MAX_LENGTH,
        method=arguments.method,
        dtype=arguments.dtype,
        optim="adamw_torch",
        per_device_train_batch_size=effective,
        gradient_checkpointing=False,
    )
    packed = padded.replace(packing=True, per_device_train_batch_size=ROWS)
    ways = {
        "padded": (padded, None),
        "packed": (packed.replace(attn_implementation=arguments.attention), None),
        "composed": (packed, padded),
        "grouped": (padded.replace(train_sampling_strategy="group_by_length"), None),
    }
    runs: dict[str, list[Learned]] = {way: [] for way in ways}
    for seed in arguments.seeds:
        for way, (setup, batched) in ways.items():
            runs[way].append(train(setup, seed, arguments.steps, data, batched))
            print(way, seed, runs[way][-1].before, runs[way][-1].last(), flush=True)
    return {
        "steps": arguments.steps,
        "last": LAST,
        "seeds": arguments.seeds,
        "before_training": {way: found[0].before for way, found in runs.items()},
        "mean_loss_of_the_last_steps": {
            kind: judged({way: [one.last()[kind] for one in found] for way, found in runs.items()})
            for kind in ("over_steps", "over_tokens")
        },
        "examples_a_step": {"padded": effective, "packed": ROWS * per_row},
        "lengths": {"shortest": stats.lengths[0][0], "mean": stats.mean, "longest": stats.longest},
        "method": arguments.method,
        "dtype": arguments.dtype,
        "packed_attention": arguments.attention,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def judged(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Losses by seed, how far padded seeds lie apart, and how far the other ways' means are from theirs."""
    seeds = losses["padded"]
    mean = sum(seeds) / len(seeds)
    return {
        **losses,
        "padded_seeds_differ_by": max(seeds) - min(seeds),
        **{
            f"{way}_differs_by": abs(sum(found) / len(found) - mean)
            for way, found in losses.items()
            if way != "padded"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flex_attention"))
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--name", default="packing_loss", help="of the result's file")
    arguments = parser.parse_args()
    figures = compare(arguments)
    write_result(arguments.name, figures)


if __name__ == "__main__":
    main()
