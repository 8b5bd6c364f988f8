"""The run that is built is the one that was asked for: facts of TRL, PEFT and bitsandbytes, on the CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import TrainerCallback
from trl.data_utils import pack_dataset

from launcher.runs.training_job import TrainingJob
from launcher.training import build, dataset
from launcher.training.callbacks import DivergedError, LaunchedTrainer, decoder_layers
from planner.base.data_files import PROFILES
from planner.base.errors import InputError, MissingExtraError, VramwiseError
from planner.data.reader import TrainingData
from planner.setup.training_setup import OPTIMIZERS, TrainingSetup

pytestmark = pytest.mark.slow

MODEL = str(PROFILES / "demo" / "model")
DATA = PROFILES / "demo" / "data" / "train.jsonl"
CPU = torch.device("cpu")
BUDGET = {"compile": "regional", "gradient_checkpointing": False, "activation_memory_budget": 0.5}


def make_setup(**changes: Any) -> TrainingSetup:
    return TrainingSetup(**{"model": "demo", "max_length": 64, "per_device_train_batch_size": 2, **changes})


def make_job(setup: TrainingSetup, **changes: Any) -> TrainingJob:
    values = {"setup": setup, "model_source": MODEL, "data_path": str(DATA), "max_steps": 2, **changes}
    return TrainingJob(**values)


def make_trainer(
    setup: TrainingSetup,
    folder: Path,
    data: TrainingData | None = None,
    *,
    evaluates: bool = False,
    **job: Any,
) -> LaunchedTrainer:
    made = make_job(setup, **job)
    shown = data or dataset.read_dataset(DATA)
    tokenizer = build.load_tokenizer(MODEL, allow_download=False)
    rows = dataset.to_trl_dataset(
        shown, tokenizer, max_length=setup.max_length, assistant_only_loss=made.assistant_only_loss
    )
    return build.build_trainer(
        setup,
        made,
        model=build.load_model(setup, MODEL, device=CPU, allow_download=False),
        tokenizer=tokenizer,
        train_dataset=rows.select(range(min(16, len(rows)))),
        eval_dataset=rows.select(range(2)) if evaluates else None,
        output_dir=folder,
        on_gpu=False,
    )


def trainable(trainer: LaunchedTrainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_qlora_is_nf4_with_the_asked_dtypes(tmp_path: Path) -> None:
    trainer = make_trainer(make_setup(lora_r=8, use_rslora=True), tmp_path)
    linears = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 4 * 7
    for linear in linears:
        state = linear.weight.quant_state
        assert (linear.weight.dtype, state.quant_type, state.nested) == (torch.uint8, "nf4", True)
        assert linear.compute_dtype == torch.bfloat16
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    weights = trainable(trainer)
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}
    assert all("lora_" in name for name in weights)
    assert {p.shape[0] for name, p in weights.items() if "lora_A" in name} == {8}
    config = trainer.model.peft_config["default"]
    assert (config.lora_alpha, config.use_rslora, config.use_dora) == (16, True, False)


def test_quantisation_knobs_reach_bitsandbytes(tmp_path: Path) -> None:
    setup = make_setup(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False, dtype="float32")
    model = build.load_model(setup, MODEL, device=CPU, allow_download=False)
    linear = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    assert (linear.weight.quant_state.quant_type, linear.weight.quant_state.nested) == ("fp4", False)
    assert linear.compute_dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "dtype", "adapter_dtype"),
    [("lora", "bfloat16", torch.float32), ("full", "bfloat16", None), ("full", "float32", None)],
)
def test_other_methods_load_the_asked_dtype(
    tmp_path: Path, method: str, dtype: str, adapter_dtype: torch.dtype | None
) -> None:
    trainer = make_trainer(make_setup(method=method, dtype=dtype, optim="adamw_torch"), tmp_path)
    base = trainer.model.get_input_embeddings().weight
    assert base.dtype == getattr(torch, dtype)
    assert base.requires_grad == (method == "full")
    if adapter_dtype is not None:
        assert {p.dtype for p in trainable(trainer).values()} == {adapter_dtype}
    assert (trainer.args.bf16, trainer.args.fp16) == (dtype == "bfloat16", False)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_of_the_contract_steps(tmp_path: Path, optim: str) -> None:
    setup = make_setup(optim=optim, target_modules=["q_proj"])
    trainer = make_trainer(setup, tmp_path, warmup_ratio=0.0, lr_scheduler_type="constant")
    before = {name: p.detach().clone() for name, p in trainable(trainer).items()}
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in trainable(trainer).items())
    assert bool(build.substitutions(setup, on_gpu=False)) == optim.startswith("paged_")


@pytest.mark.parametrize(
    ("layers", "flags"), [(None, [True] * 4), (1, [True, False, False, False]), (0, [False] * 4)]
)
def test_the_first_k_layers_are_checkpointed(tmp_path: Path, layers: int | None, flags: list[bool]) -> None:
    trainer = make_trainer(make_setup(checkpointed_layers=layers), tmp_path, max_steps=1)
    trainer.train()
    assert [layer.gradient_checkpointing for layer in decoder_layers(trainer.model)] == flags


def test_without_checkpointing_no_layer_is_checkpointed(tmp_path: Path) -> None:
    trainer = make_trainer(make_setup(gradient_checkpointing=False), tmp_path, max_steps=1)
    trainer.train()
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(trainer.model))


def test_kbit_preparation_upcasts_what_is_not_quantised(tmp_path: Path) -> None:
    trainer = make_trainer(make_setup(prepare_for_kbit_training=True), tmp_path)
    assert trainer.model.get_input_embeddings().weight.dtype == torch.float32


def test_nothing_leaves_the_machine_and_no_secret_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    args = make_trainer(make_setup(), tmp_path).args
    assert args.report_to == []
    assert args.push_to_hub is False
    assert args.hub_token is None
    assert args.save_total_limit is None
    assert args.logging_nan_inf_filter is False
    assert "hf_canary" not in repr(args)


@pytest.mark.parametrize("rows", ["messages", "prompt_completion", "text"])
def test_measured_lengths_are_those_that_trl_trains_on(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()[:16]]
    made: dict[str, Any] = {
        "messages": [{"messages": turns} for turns in lines],
        "prompt_completion": [
            {"prompt": turns[0]["content"], "completion": " " + turns[1]["content"]} for turns in lines
        ],
        "text": [{"text": turns[1]["content"]} for turns in lines],
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in made[rows]))
    data = dataset.read_dataset(path)
    trained = make_trainer(make_setup(max_length=512), tmp_path, data).train_dataset
    stats = dataset.measure_stats(data, build.load_tokenizer(MODEL, allow_download=False))
    lengths = sorted(len(ids) for ids in trained["input_ids"])
    assert sorted(n for n, count in stats.lengths for _ in range(count)) == lengths
    assert stats.loss_tokens == sum(label != -100 for labels in trained["labels"] for label in labels)
    assert not stats.estimated


def test_assistant_tokens_are_those_that_trl_trains_on(tmp_path: Path) -> None:
    data = dataset.read_dataset(DATA)
    data = TrainingData(data.format, data.examples[:16], data.source)
    trained = make_trainer(make_setup(max_length=512), tmp_path, data, assistant_only_loss=True).train_dataset
    tokenizer = build.load_tokenizer(MODEL, allow_download=False)
    stats = dataset.measure_stats(data, tokenizer, assistant_only_loss=True)
    assert stats.loss_on == "assistant"
    assert stats.loss_tokens == sum(label != -100 for labels in trained["labels"] for label in labels)


@pytest.mark.parametrize("max_length", [32, 50, 128, 1000])
def test_packing_gives_as_many_sequences_as_trl(tmp_path: Path, max_length: int) -> None:
    from datasets import Dataset

    data = dataset.read_dataset(DATA)
    tokenizer = build.load_tokenizer(MODEL, allow_download=False)
    stats = dataset.measure_stats(data, tokenizer)
    lengths = [n for n, count in stats.lengths for _ in range(count)]
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), max_length, "bfd", {})
    assert stats.packing(max_length).sequences == len(packed)


def test_a_packed_run_trains(tmp_path: Path) -> None:
    trainer = make_trainer(make_setup(packing=True, max_length=128), tmp_path)
    assert max(len(ids) for ids in trainer.train_dataset["input_ids"]) <= 128
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_a_tokenizer_without_template_gets_chatml(tmp_path: Path) -> None:
    tokenizer = build.load_tokenizer(MODEL, allow_download=False)
    tokenizer.chat_template = None
    assert dataset.ensure_chat_template(tokenizer)
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], tokenize=False
    )
    assert shown == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|><|im_end|>\n"
    assert not dataset.ensure_chat_template(tokenizer)


def test_an_example_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = build.load_tokenizer(MODEL, allow_download=False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="example 1: the chat template refuses it"):
        dataset.measure_stats(dataset.read_dataset(DATA), tokenizer)


def test_parquet_holds_the_same_examples(tmp_path: Path) -> None:
    import pandas as pd

    data = dataset.read_dataset(DATA)
    path = tmp_path / "train.parquet"
    pd.DataFrame([json.loads(line) for line in DATA.read_text().splitlines()]).to_parquet(path)
    assert dataset.read_dataset(path).examples == data.examples
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a Parquet file"):
        dataset.read_dataset(path)


SHARDED = {"num_processes": 2, "distributed": "fsdp", "optim": "adamw_torch_fused"}


@pytest.mark.parametrize(
    ("changes", "on_gpu", "named"),
    [
        ({**SHARDED, "optim": "adamw_8bit"}, True, "optim with distributed=fsdp"),
        ({**SHARDED, "optim": "paged_adamw_32bit"}, True, "optim with distributed=fsdp"),
        ({**SHARDED, "use_dora": True}, True, "use_dora=true with distributed=fsdp"),
        ({**SHARDED, "prepare_for_kbit_training": True}, True, "prepare_for_kbit_training=true with"),
        ({**SHARDED, "activation_offloading": True}, True, "activation_offloading=true with distributed"),
        ({**SHARDED, "dtype": "float16"}, True, "dtype=float16 with distributed=fsdp"),
        ({**SHARDED, "lora_r": 1}, True, "lora_r=1 with num_processes=2"),
        ({"dtype": "float16", "method": "full"}, True, "float16"),
        ({"dtype": "float16"}, False, "float16"),
        ({"activation_offloading": True}, False, "activation_offloading"),
        ({"compile": "regional"}, False, "compile"),
        ({**BUDGET, "lora_dropout": 0.1}, True, "activation_memory_budget needs lora_dropout 0"),
        ({"packing": True, "attn_implementation": "flex_attention"}, False, "flex_attention"),
        ({"kernels": "liger"}, True, "liger"),
        ({"attn_implementation": "flash_attention_2"}, True, "flash_attention_2"),
    ],
)
def test_what_cannot_run_is_refused_by_name(changes: dict[str, Any], on_gpu: bool, named: str) -> None:
    with pytest.raises(VramwiseError, match=named):
        build.refuse_unsupported(make_setup(**changes), on_gpu=on_gpu)


def test_an_absent_model_is_one_line(tmp_path: Path) -> None:
    for source in (str(tmp_path / "absent"), "no-such-org/no-such-model"):
        with pytest.raises(InputError) as caught:
            build.load_tokenizer(source, allow_download=False)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError) as caught:
            build.load_model(make_setup(), source, device=CPU, allow_download=False)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_a_poisoned_step_ends_the_run_before_the_update(
    tmp_path: Path, poison: str, accumulated: int
) -> None:
    trainer = make_trainer(make_setup(max_length=64, gradient_accumulation_steps=accumulated), tmp_path)
    name, weight = next(iter(trainable(trainer).items()))
    if poison == "weight":
        trainer.model.get_input_embeddings().weight.data.fill_(float("nan"))
    else:
        weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {n: p.detach().clone() for n, p in trainable(trainer).items()}
    with pytest.raises(DivergedError, match="loss is nan" if poison == "weight" else "gradient norm"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[n], p) for n, p in trainable(trainer).items()), name


def test_a_loss_that_was_broken_in_one_micro_step_alone_ends_the_run(tmp_path: Path) -> None:
    """Whatever the gradient's norm says."""
    trainer = make_trainer(make_setup(max_length=64, gradient_accumulation_steps=2), tmp_path)
    trainer._losses = [torch.tensor(1.0), torch.tensor(float("inf"))]
    with pytest.raises(DivergedError, match="the loss is inf in step 1"):
        trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.0))


@pytest.mark.parametrize("libraries_frozen", [False, True])
def test_garbage_collection_passes_over_what_was_there_before_training(
    tmp_path: Path, quiet_heap: None, libraries_frozen: bool
) -> None:
    frozen = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            frozen.append(gc.get_freeze_count())

    trainer = make_trainer(make_setup(max_length=64), tmp_path)
    trainer.add_callback(Look())
    if not libraries_frozen:
        gc.unfreeze()
    trainer.train()
    assert min(frozen) > 100_000
    assert (gc.get_freeze_count() > 0) == libraries_frozen


def test_missing_extras_name_the_package() -> None:
    with pytest.raises(MissingExtraError, match="liger-kernel"):
        build.refuse_unsupported(make_setup(kernels="liger"), on_gpu=True)


def test_a_missing_tokenizer_is_told_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer could be loaded: the folder needs tokenizer\.json"):
        build.load_tokenizer(str(tmp_path), allow_download=False)
    with pytest.raises(
        InputError, match=r"^nobody/nothing: .* not on this machine; --allow-download fetches"
    ):
        build.load_tokenizer("nobody/nothing", allow_download=False)
