"""What is evaluated on is never trained, told by token ids, and is what the plan left out."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")
from launcher.runs.training_job import TrainingJob
from launcher.training import dataset
from launcher.training.arguments import sft_config
from launcher.training.build import load_tokenizer
from launcher.training.several.rows import made_rows
from launcher.training.split import Split, trained_too
from planner.base.data_files import PROFILES
from planner.base.errors import InputError
from planner.data.examples import PlainText, TrainingData
from planner.setup.training_setup import TrainingSetup

DEMO = PROFILES / "demo"
TOKENIZER = load_tokenizer(str(DEMO / "model"), allow_download=False)
DATA = dataset.read_dataset(DEMO / "data" / "train.jsonl")


def ids(rows: dataset.Dataset) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows["input_ids"]]


def test_no_token_sequence_of_the_evaluation_is_trained() -> None:
    """The data holds copies, which a split by rows alone would part."""
    copied = TrainingData(DATA.format, DATA.examples + DATA.examples[::3], DATA.source)
    split = Split(0.2, 42)
    train, evaluation = dataset.split_trl_datasets(copied, TOKENIZER, max_length=128, split=split)
    assert set(ids(train)).isdisjoint(ids(evaluation))
    whole = dataset.to_trl_dataset(copied, TOKENIZER, max_length=128)
    assert sorted(ids(train) + ids(evaluation)) == sorted(ids(whole))
    assert len(evaluation) == pytest.approx(0.2 * len(whole), abs=2)
    stats = dataset.measure_stats(copied, TOKENIZER, split=split)
    assert stats.examples == len(train)
    assert stats.total_tokens == sum(map(len, ids(train)))


def test_another_length_evaluates_on_the_same_examples() -> None:
    """So that a run that goes on with another setup has not trained what it evaluates on."""
    parts = [
        dataset.split_trl_datasets(DATA, TOKENIZER, max_length=length, split=Split(16, 7))
        for length in (128, 24)
    ]
    long, short = (ids(evaluation) for _, evaluation in parts)
    assert {row[:24] for row in long} >= set(short)
    assert set(short).isdisjoint(ids(parts[1][0]))


def test_rows_that_are_alike_once_they_are_cut_are_left_out_of_the_evaluation() -> None:
    texts = [PlainText(f"The beginning is the same for all of them and long {n}") for n in range(20)]
    data = TrainingData("text", tuple(texts), "data")
    with pytest.raises(InputError, match="every example to evaluate on is trained too"):
        dataset.split_trl_datasets(data, TOKENIZER, max_length=4, split=Split(5, 1))
    texts += [PlainText(f"{n} is the first word of this one") for n in range(20)]
    data = TrainingData("text", tuple(texts), "data")
    train, evaluation = dataset.split_trl_datasets(data, TOKENIZER, max_length=4, split=Split(0.5, 1))
    assert set(ids(train)).isdisjoint(ids(evaluation))
    assert 0 < len(evaluation) < 20


def test_rows_of_an_evaluation_file_that_are_trained_are_counted() -> None:
    whole = dataset.to_trl_dataset(DATA, TOKENIZER, max_length=128)
    assert trained_too(whole, whole) == list(range(len(whole)))
    part = dataset.take_rows(whole, list(range(3, 9)))
    assert trained_too(dataset.take_rows(whole, [0, 4, 5, 20]), part) == [1, 2]


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_runs_in_the_batches_that_are_planned(packing: bool, tmp_path: Path) -> None:
    """The plan's evaluation is a forward pass of the training's micro-batch (planner/memory/estimate.py)."""
    knobs = {"packing": True, "attn_implementation": "flash_attention_2"} if packing else {}
    setup = TrainingSetup(model="m", max_length=64, per_device_train_batch_size=3, **knobs)  # type: ignore[arg-type]
    job = TrainingJob(setup=setup, model_source="m", data_path="d", eval_split=0.1)
    found = sft_config(setup, job, output_dir=tmp_path, on_gpu=False, evaluates=True)
    assert found.per_device_eval_batch_size == setup.per_device_train_batch_size
    assert found.eval_packing == found.packing == packing
    assert found.prediction_loss_only
    assert found.eval_strategy == "epoch"


def test_evaluating_on_what_is_trained_is_told() -> None:
    data = str(DEMO / "data" / "train.jsonl")
    setup = TrainingSetup(model="m", max_length=128)
    job = TrainingJob(setup=setup, model_source=str(DEMO / "model"), data_path=data, eval_data_path=data)
    told: list[str] = []
    made_rows(job, told.append)
    (warning,) = told
    assert "320 of 320 examples" in warning
    assert "are trained on too" in warning
