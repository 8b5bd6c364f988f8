"""The longest micro-batch before the first step: it is the longest, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from launcher.runs.training_job import TrainingJob
from launcher.training import build
from launcher.training.rehearsal import Rehearsal, longest_rows
from planner.base.data_files import PROFILES
from planner.setup.training_setup import TrainingSetup

DEMO = PROFILES / "demo" / "model"
LENGTHS = (9, 40, 12, 33, 7, 21, 15, 5)


def rows() -> Dataset:
    made = []
    for index, length in enumerate(LENGTHS):
        ids = [(index * 7 + place) % 100 + 3 for place in range(length)]
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return Dataset.from_list(made)


def trainer(folder: Path, **changes: Any) -> Any:
    setup = TrainingSetup(
        **{
            "model": "demo",
            "max_length": 64,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "lora_dropout": 0.1,
            "dtype": "float32",
            "method": "lora",
            **changes,
        }
    )
    job = TrainingJob(
        setup=setup,
        model_source=str(DEMO),
        data_path="data.jsonl",
        learning_rate=1e-2,
        max_steps=3,
        warmup_ratio=0.0,
    )
    torch.manual_seed(7)
    device = torch.device("cpu")
    return build.build_trainer(
        setup,
        job,
        model=build.load_model(setup, str(DEMO), device=device, allow_download=False),
        tokenizer=build.load_tokenizer(str(DEMO), allow_download=False),
        train_dataset=rows(),
        eval_dataset=rows(),
        output_dir=folder,
        on_gpu=False,
    )


def learned(made: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in made.state.log_history if "num_tokens" in entry]
    weights = {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}
    return [*losses, *tokens], weights


def test_the_longest_rows_are_taken_and_equal_ones_need_none() -> None:
    found = longest_rows(rows(), 2)
    assert found is not None
    assert [len(row["input_ids"]) for row in found] == [40, 33]
    assert longest_rows(Dataset.from_list([{"input_ids": [1, 2]}] * 3), 2) is None


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_a_rehearsed_run_learns_bit_for_bit_what_one_without_learns(tmp_path: Path, optim: str) -> None:
    plain = learned(trainer(tmp_path / "plain", optim=optim))
    told: list[str] = []
    rehearsed = trainer(tmp_path / "rehearsed", optim=optim)
    rehearsed.add_callback(Rehearsal(rehearsed, told.append))
    again = learned(rehearsed)
    assert told == ["the longest micro-batch, 2 x 40 tokens, went through"]
    assert again[0] == plain[0]
    assert all(torch.equal(again[1][name], weight) for name, weight in plain[1].items())


def runs_out(batch: int) -> Callable[..., Any]:
    def loop(made: Any, *args: Any, **kwargs: Any) -> Any:
        if made.args.per_device_eval_batch_size >= batch:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _evaluate(made, *args, **kwargs)

    from trl import SFTTrainer

    _evaluate = SFTTrainer.evaluate
    return loop


def test_an_evaluation_that_runs_out_goes_on_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    made = trainer(tmp_path)
    made.tell = told.append
    monkeypatch.setattr("trl.SFTTrainer.evaluate", runs_out(2))
    assert made.evaluate()["eval_loss"] > 0
    assert told == ["evaluation ran out of memory; from here on it takes one example at a time"]


def test_an_evaluation_that_cannot_be_done_saves_the_weights_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path)
    made.args.eval_strategy, made.args.eval_steps = "steps", 2
    saved: list[int] = []
    monkeypatch.setattr(made, "_save_checkpoint", lambda *_, **__: saved.append(made.state.global_step))
    monkeypatch.setattr("trl.SFTTrainer.evaluate", runs_out(1))
    with pytest.raises(torch.OutOfMemoryError):
        made.train()
    assert saved == [made.state.global_step]
