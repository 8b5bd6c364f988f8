from __future__ import annotations

from pathlib import Path

from launcher.demo.demo_model import EVAL_EXAMPLES, TRAIN_EXAMPLES, write_data
from planner.base.data_files import PROFILES
from planner.data.reader import Conversation, TrainingData, read_training_data

DEMO = PROFILES / "demo"


def questions(data: TrainingData) -> set[str]:
    return {e.messages[0].content for e in data.examples if isinstance(e, Conversation)}


def test_the_shipped_data_is_what_the_script_writes(tmp_path: Path) -> None:
    write_data(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / "data" / name).read_bytes()


def test_evaluation_asks_nothing_that_was_trained_on() -> None:
    train = read_training_data(DEMO / "data" / "train.jsonl")
    held_out = read_training_data(DEMO / "data" / "eval.jsonl")
    assert (len(train.examples), len(held_out.examples)) == (TRAIN_EXAMPLES, EVAL_EXAMPLES)
    assert not questions(train) & questions(held_out)


def test_the_demo_is_small_and_holds_no_pickle() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".jinja", ".safetensors", ".png"}
