"""Does packing or grouping change what is learned? Loss of the demo model after 200 steps, four ways.

    python -m benchmarks.packing_loss [--attention flex_attention] [--method qlora] [--steps N]

The demo's examples are joined to conversations of one to eight exchanges, most of them short. The demo model
learns them in random padded batches with two seeds, in packed rows and in groups of like length with the
first seed, each with as many examples an optimizer step (packed rows: on average). The mean loss of the last
50 steps with packing or grouping must differ from that of the same seed by less than the two seeds do.
Runs on the GPU where there is one (flex attention needs it), else on the CPU. Writes
benchmarks/results/packing_loss.json.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.results import write_result
from launcher import build, dataset
from launcher.run_folder import TrainingJob
from planner.data_files import PROFILES
from planner.dataset_reader import Conversation, TrainingData
from planner.training_setup import TrainingSetup

MODEL, DATA = PROFILES / "demo" / "model", PROFILES / "demo" / "data" / "train.jsonl"
CONVERSATIONS, MOST_EXCHANGES = 800, 8
LN_2 = 0.6931
MAX_LENGTH, ROWS = 512, 3
STEPS, LAST = 200, 50
SEEDS = (1, 2)


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


def losses(setup: TrainingSetup, seed: int, steps: int, data: TrainingData) -> list[float]:
    """The training loss of each step."""
    on_gpu = torch.cuda.is_available()
    job = TrainingJob(
        setup=setup,
        model_source=str(MODEL),
        data_path=str(DATA),
        max_steps=steps,
        seed=seed,
        logging_steps=1,
        learning_rate=1e-3,
    )
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.build_trainer(
            setup,
            job,
            model=build.load_model(
                setup,
                str(MODEL),
                device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
                allow_download=False,
            ),
            tokenizer=build.load_tokenizer(str(MODEL), allow_download=False),
            train_dataset=dataset.to_trl_dataset(data),
            eval_dataset=None,
            output_dir=Path(folder),
            on_gpu=on_gpu,
        )
        trainer.train()
        return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


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
    packed = padded.replace(
        packing=True, per_device_train_batch_size=ROWS, attn_implementation=arguments.attention
    )
    grouped = padded.replace(train_sampling_strategy="group_by_length")
    runs = {
        "padded, first seed": (padded, SEEDS[0]),
        "padded, second seed": (padded, SEEDS[1]),
        "packed, first seed": (packed, SEEDS[0]),
        "grouped, first seed": (grouped, SEEDS[0]),
    }
    means = {}
    for name, (setup, seed) in runs.items():
        every = losses(setup, seed, arguments.steps, data)
        last = every[-LAST:]
        means[name] = sum(last) / len(last)
        print(f"{name}: {every[0]:.4f} -> {means[name]:.4f}", flush=True)
    first, second, packing, grouping = means.values()
    return {
        "mean_loss_of_the_last_steps": means,
        "steps": arguments.steps,
        "last": LAST,
        "seeds_differ_by": abs(first - second),
        "packing_differs_by": abs(packing - first),
        "grouping_differs_by": abs(grouping - first),
        "examples_a_step": {"padded": effective, "packed": ROWS * per_row},
        "method": arguments.method,
        "dtype": arguments.dtype,
        "packed_attention": arguments.attention,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flex_attention"))
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--name", default="packing_loss", help="of the result's file")
    arguments = parser.parse_args()
    figures = compare(arguments)
    write_result(arguments.name, figures)
    for name in ("seeds_differ_by", "packing_differs_by", "grouping_differs_by"):
        print(f"{name}: {figures[name]:.5f}")


if __name__ == "__main__":
    main()
