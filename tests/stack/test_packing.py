"""How examples become batches: packed rows of one shape, groups of like length, and what compiles of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.trainer_pt_utils import LengthGroupedSampler

from launcher.measuring.measured_data import TokenCounter, random_rows, token_dataset
from launcher.measuring.profile import Profile
from launcher.training.callbacks import LaunchedTrainer
from launcher.training.compilation import compile_decoder_layers
from tests.stack.test_build import make_job, make_setup, make_trainer

IGNORED = -100
PLAIN = {"method": "lora", "dtype": "float32", "optim": "adamw_torch"}
PARTITIONED = "aot_eager_decomp_partition"  # inductor's partitioner without its code generation


def batches_of(trainer: LaunchedTrainer) -> list[dict[str, Any]]:
    return list(trainer.get_train_dataloader())


@pytest.mark.parametrize("size", [1, 5, 7])
def test_every_packed_batch_has_one_shape_the_last_too(tmp_path: Path, size: int) -> None:
    setup = make_setup(packing=True, max_length=128, per_device_train_batch_size=size)
    trainer = make_trainer(setup, tmp_path)
    batches = batches_of(trainer)
    rows = len(trainer.train_dataset)
    assert len(batches) == -(-rows // size)
    if size > 1:
        assert rows % size, "the last batch is to be a partial one"
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(1, size * 128)}
    assert {tuple(batch["labels"].shape) for batch in batches} == {(1, size * 128)}


def test_padding_of_a_packed_batch_is_outside_the_loss_and_seen_by_no_example(tmp_path: Path) -> None:
    trainer = make_trainer(make_setup(packing=True, max_length=128), tmp_path)
    unpadded = TokenCounter(trainer.data_collator)
    trainer.data_collator = unpadded
    batches = batches_of(trainer)
    assert sum(unpadded.useful) < sum(unpadded.processed)
    for batch, useful in zip(batches, unpadded.useful, strict=True):
        assert (batch["labels"][0, useful:] == IGNORED).all()
        # A position of 0 starts a sequence, so each token of padding is one by itself.
        assert (batch["position_ids"][0, useful:] == 0).all()
        assert "attention_mask" not in batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_has_the_loss_of_the_unpadded_one_and_of_its_examples(
    tmp_path: Path, attention: str
) -> None:
    setup = make_setup(packing=True, max_length=128, attn_implementation=attention, **PLAIN)
    trainer = make_trainer(setup, tmp_path)
    model = trainer.model.eval()
    rows = [trainer.train_dataset[index] for index in range(2)]
    padded = trainer.data_collator(rows)
    trainer.data_collator.pad_to_multiple_of = None
    bare = trainer.data_collator(rows)
    assert padded["input_ids"].shape != bare["input_ids"].shape
    with torch.no_grad():
        losses = [float(trainer.compute_loss(model, dict(batch))) for batch in (padded, bare)]
        total, count = 0.0, 0
        for row in rows:
            start = 0
            for length in row["seq_lengths"]:
                ids = torch.tensor([row["input_ids"][start : start + length]])
                labels = torch.tensor([row["labels"][start : start + length]])
                counted = int((labels[0, 1:] != IGNORED).sum())
                total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * counted
                count += counted
                start += length
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


def test_grouping_uses_transformers_sampler_over_a_whole_step(tmp_path: Path) -> None:
    setup = make_setup(
        max_length=256, train_sampling_strategy="group_by_length", gradient_accumulation_steps=3
    )
    trainer = make_trainer(setup, tmp_path)
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    assert isinstance(sampler, LengthGroupedSampler)
    assert sampler.batch_size == 6
    assert sampler.lengths == [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"packing": True, "max_length": 128}, 1),
        ({"max_length": 256}, 3),
        ({"max_length": 256, "train_sampling_strategy": "group_by_length"}, 3),
    ],
)
def test_how_many_variants_of_a_layer_compile(tmp_path: Path, changes: dict[str, Any], most: int) -> None:
    """Packed batches: one. Batches of many lengths: the first length, then one for any length; one more for
    a batch whose examples are equally long, which has no mask.
    """
    trainer = make_trainer(make_setup(target_modules=["q_proj"], **changes, **PLAIN), tmp_path, max_steps=5)
    counter = TokenCounter(trainer.data_collator)
    trainer.data_collator = counter
    trainer.add_callback(
        compile_decoder_layers(trainer.model, activation_memory_budget=None, backend=PARTITIONED)
    )
    counters.clear()
    trainer.train()
    assert 0 < counters["stats"]["unique_graphs"] <= most
    assert (len(set(counter.processed)) > most) == ("packing" not in changes)


@pytest.mark.parametrize(
    "changes",
    [{"packing": True}, {"train_sampling_strategy": "group_by_length"}, {}],
    ids=["packed", "grouped", "random"],
)
def test_the_useful_tokens_of_measured_runs_are_the_examples_own(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    from launcher.training import build

    setup = make_setup(max_length=32, **changes)
    profile = Profile(setup=setup, lengths=(5, 40, 17, 9, 32, 3, 21))
    rows = random_rows(profile, 1, 100)
    assert [len(row) for row in rows] == list(profile.lengths)
    trainer = build.build_trainer(
        setup,
        make_job(setup),
        model=build.load_model(
            setup, make_job(setup).model_source, device=torch.device("cpu"), allow_download=False
        ),
        tokenizer=build.load_tokenizer(make_job(setup).model_source, allow_download=False),
        train_dataset=token_dataset(rows),
        eval_dataset=None,
        output_dir=tmp_path,
        on_gpu=False,
    )
    counter = TokenCounter(trainer.data_collator)
    trainer.data_collator = counter
    batches_of(trainer)
    assert sum(counter.useful) == sum(min(32, length) for length in profile.lengths)
    assert all(used <= made for used, made in zip(counter.useful, counter.processed, strict=True))
    if setup.packing:
        assert set(counter.processed) == {64}


@pytest.mark.parametrize(
    ("count", "size", "accumulated"), [(4000, 4, 4), (900, 8, 2), (300, 2, 8), (50, 4, 4)]
)
def test_grouped_batches_are_as_long_as_transformers_makes_them(
    count: int, size: int, accumulated: int
) -> None:
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from planner.data.batches import Lengths, padding
    from planner.data.lengths import DatasetStats

    generator = torch.Generator().manual_seed(1)
    drawn = torch.empty(count).log_normal_(6.0, 0.9, generator=generator).clamp(50, 4000).int().tolist()
    processed = 0
    for _ in range(20):
        order = get_length_grouped_indices(drawn, size * accumulated, generator=generator)
        for start in range(0, count, size):
            batch = [drawn[index] for index in order[start : start + size]]
            processed += max(batch) * len(batch)
    stats = DatasetStats.from_lengths(
        drawn, loss_tokens=0, loss_on="all", data_format="text", estimated=False
    )
    lengths = Lengths(stats, 4096)
    said = padding(lengths, lengths.grouped_batches(size, size * accumulated)).processed_tokens
    assert said == pytest.approx(processed / 20, rel=0.02 if count > 500 else 0.1)


@pytest.mark.parametrize("count", [900, 4500])
def test_trl_packs_a_thousand_examples_at_a_time_as_tightly_as_all_at_once(count: int) -> None:
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from planner.data.lengths import DatasetStats

    generator = torch.Generator().manual_seed(1)
    drawn = torch.empty(count).log_normal_(4.0, 0.9, generator=generator).clamp(5, 400).int().tolist()
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in drawn]}), 512, "bfd", {})
    stats = DatasetStats.from_lengths(
        drawn, loss_tokens=0, loss_on="all", data_format="text", estimated=False
    )
    assert stats.packing(512).sequences == pytest.approx(len(packed), rel=0.0 if count <= 1000 else 0.01)
