"""Loss and gradients of a step on a GPU: packed with flex_attention, and with compiled decoder layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for _module in ("trl", "peft", "bitsandbytes", "datasets"):
    pytest.importorskip(_module)

from launcher.runs.folder import TrainingJob  # noqa: E402
from launcher.training import build, dataset  # noqa: E402 - what the optional stack lacks is skipped before
from launcher.training.callbacks import LaunchedTrainer  # noqa: E402
from launcher.training.compilation import compile_decoder_layers, recompute_all  # noqa: E402
from planner.base.data_files import PROFILES  # noqa: E402
from planner.setup.training_setup import TrainingSetup  # noqa: E402

pytestmark = pytest.mark.gpu

MODEL = PROFILES / "demo" / "model"
DATA = PROFILES / "demo" / "data" / "train.jsonl"
IGNORED = -100
LOSS_ERROR = 2e-3
# Of each parameter's norm. Rounding to the 8 bits of bfloat16 moved one by 4% on a CPU; tensor cores round
# float32 to 11 bits.
GRADIENT_ERROR = {"bfloat16": 0.1, "float32": 0.01}
Gradients = dict[str, Any]


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def make_trainer(folder: Path, **changes: Any) -> LaunchedTrainer:
    """The demo's trainer on the GPU, with an adapter that adds something to the base."""
    setup = TrainingSetup(**{"model": "demo", "max_length": 256, "per_device_train_batch_size": 2, **changes})
    tokenizer = build.load_tokenizer(str(MODEL), allow_download=False)
    rows = dataset.to_trl_dataset(dataset.read_dataset(DATA), tokenizer, max_length=setup.max_length)
    trainer = build.build_trainer(
        setup,
        TrainingJob(setup=setup, model_source=str(MODEL), data_path=str(DATA), max_steps=1),
        model=build.load_model(setup, str(MODEL), device=torch.device("cuda", 0), allow_download=False),
        tokenizer=tokenizer,
        train_dataset=rows.select(range(16)),
        eval_dataset=None,
        output_dir=folder,
        on_gpu=True,
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    if setup.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    return trainer


def compile_layers(trainer: LaunchedTrainer) -> None:
    compile_decoder_layers(trainer.model, activation_memory_budget=None)
    recompute_all(trainer.model)


def collect(trainer: LaunchedTrainer) -> Gradients:
    """The gradients since the last call."""
    found = {n: p.grad.float() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    assert found
    return found


def step(trainer: LaunchedTrainer, batch: Mapping[str, Any]) -> tuple[float, Gradients]:
    """Loss and gradients of a batch as the collator made it."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=trainer.args.bf16):
        loss = trainer.compute_loss(trainer.model, dict(trainer._prepare_inputs(dict(batch))))
    loss.backward()
    return float(loss.detach()), collect(trainer)


def separate(trainer: LaunchedTrainer, rows: list[dict[str, Any]]) -> tuple[float, Gradients]:
    """Loss and gradients of packed rows' examples, each alone in its batch, over all their tokens."""
    examples = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            ids, labels = (torch.tensor([row[name][part]], device="cuda") for name in ("input_ids", "labels"))
            examples.append((ids, labels, int((labels[0, 1:] != IGNORED).sum())))
            start += length
    counted = sum(count for _, _, count in examples)
    total = 0.0
    for ids, labels, count in examples:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = trainer.model(input_ids=ids, labels=labels, use_cache=False).loss * (count / counted)
        loss.backward()
        total += float(loss.detach())
    return total, collect(trainer)


def assert_alike(
    got: tuple[float, Gradients], expected: tuple[float, Gradients], *, dtype: str = "bfloat16"
) -> None:
    assert got[0] == pytest.approx(expected[0], rel=LOSS_ERROR)
    assert set(got[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        size = float(gradient.norm())
        assert size > 0, name
        assert float((got[1][name] - gradient).norm()) < GRADIENT_ERROR[dtype] * size, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_packed_batch_trains_like_its_examples_alone(tmp_path: Path, compiled: bool) -> None:
    trainer = make_trainer(tmp_path, packing=True, attn_implementation="flex_attention")
    rows = [trainer.train_dataset[index] for index in range(2)]
    assert all(len(row["seq_lengths"]) > 1 for row in rows)
    base = trainer.model.get_base_model()
    base.set_attn_implementation("sdpa")
    expected = separate(trainer, rows)
    base.set_attn_implementation("flex_attention")
    if compiled:
        compile_layers(trainer)
    batch = trainer.data_collator(rows)
    assert_alike(step(trainer, batch), expected)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": False}, {"method": "lora", "dtype": "float32"}],
    ids=["checkpointed", "kept", "float32"],
)
def test_compiled_layers_have_the_gradients_of_eager_ones(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **changes)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    assert int(batch["attention_mask"].min()) == 0, "one of the two is to be padded"
    expected = step(trainer, batch)
    compile_layers(trainer)
    assert_alike(step(trainer, batch), expected, dtype=changes.get("dtype", "bfloat16"))
