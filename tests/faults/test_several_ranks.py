"""Several processes train as one does: by DDP and FSDP2 over gloo, small models in float32."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.events import AdapterEvent, CheckpointEvent
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints
from launcher.runs.kept.resumption import shared_by
from tests import forks
from tests.faults import ranks, small_runs, told_logits
from tests.faults.small_runs import DEMO, SETUP, events_of, go_on, make_run

pytestmark = pytest.mark.slow

STEPS = 8
ROUNDING = 1e-4
"""What sums of float32 in another order may come to: 2^-24 an operation, some hundred of them in a row, and
eight of Adam's steps, whose quotients are as large for a gradient that is rounding alone as for any other.
Seen: 2.3e-5 in a gradient norm of the whole model, below 2e-5 with adapters."""
BFLOAT16 = 2e-2
"""TRL holds adapters on a 4-bit base in bfloat16: 2^-9 a value, at eight updates."""


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("untied"), tied=False)


def small_model(folder: Path, *, tied: bool) -> Path:
    """A model whose head is its embedding or is not, in two files, beside the demo's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    shutil.copytree(DEMO / "model", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(DEMO / "model")
    config.update({"tie_word_embeddings": tied, "hidden_size": 64, "intermediate_size": 192})
    config.update({"num_hidden_layers": 2, "head_dim": 16})
    set_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="500KB")
    return folder


def run_of(root: Path, name: str, model: Path, **knobs: Any) -> RunFolder:
    setup = dataclasses.replace(SETUP, gradient_accumulation_steps=2, **knobs)
    return make_run(root, name=name, setup=setup, model_source=str(model), max_steps=STEPS)


def on_two(run: RunFolder, name: str, way: str) -> RunFolder:
    """The same run on two processes, trained to its end."""
    job = run.read_job()
    changes = {
        field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name != "setup"
    }
    other = make_run(run.path.parent, name=name, setup=ranks.shared(job.setup, way), **changes)
    assert ranks.trained(other) == [0, 0], other.log("trainer").read_text()[-3000:]
    return other


def alike(one: RunFolder, other: RunFolder, bound: float) -> None:
    for name in ("loss", "grad_norm"):
        mine, its = ranks.figures(one, name), ranks.figures(other, name)
        assert len(mine) == len(its) == STEPS
        assert its == pytest.approx(mine, rel=bound), name
    assert ranks.figures(one, "num_tokens") == ranks.figures(other, "num_tokens")


def test_adapters_learn_on_two_processes_what_they_learn_on_one(tmp_path: Path, untied: Path) -> None:
    one = run_of(tmp_path, "one", untied)
    assert small_runs.trained(one) == 0
    for way in ("ddp", "fsdp"):
        run = on_two(one, way, way)
        alike(one, run, ROUNDING)
        assert len(events_of(run, AdapterEvent)) == 1
        assert not (run.path / ".rows").exists()
    # What was sharded is whole in the file, and of the same names.
    assert {path.name for path in (tmp_path / "fsdp" / "adapter").iterdir()} == {
        path.name for path in one.adapter.iterdir()
    }
    assert close_files(one.adapter, tmp_path / "fsdp" / "adapter")


def close_files(one: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    mine, its = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return mine.keys() == its.keys() and all(
        torch.allclose(mine[name], its[name], rtol=0.0, atol=1e-4) for name in mine
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_of_shards_answers_in_one_process_as_it_did(
    tmp_path: Path, untied: Path, method: str
) -> None:
    setup = ranks.shared(SETUP.replace(method=method), "fsdp")
    rate: dict[str, Any] = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    run = make_run(tmp_path, setup=setup, model_source=str(untied), max_steps=3, **rate)
    sharded, alone = tmp_path / "sharded.safetensors", tmp_path / "alone.safetensors"
    tell = functools.partial(told_logits.tell_at_the_end, sharded)
    assert ranks.trained(run, prepare=tell) == [0, 0], run.log("trainer").read_text()[-3000:]
    loaded = forks.start(told_logits.loaded_alone, run.path, alone, output=tmp_path / "log")
    assert small_runs.code_of(loaded) == 0, (tmp_path / "log").read_text()[-3000:]
    import torch
    from safetensors.torch import load_file

    mine, its = (load_file(path)["logits"] for path in (sharded, alone))
    torch.testing.assert_close(its, mine, rtol=1e-5, atol=1e-6)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(untied)


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_model_learns_sharded_what_it_learns_on_one_process(
    tmp_path: Path, untied: Path, tied: bool
) -> None:
    model = small_model(tmp_path / "tied", tied=True) if tied else untied
    one = run_of(tmp_path, "one", model, method="full")
    assert small_runs.trained(one) == 0
    alike(one, on_two(one, "fsdp", "fsdp"), ROUNDING)


def test_a_4_bit_base_and_its_constants_are_the_same_when_sharded(tmp_path: Path, untied: Path) -> None:
    one = run_of(tmp_path, "one", untied, method="qlora")
    assert small_runs.trained(one) == 0
    run = on_two(one, "fsdp", "fsdp")
    # Adapters begin with no effect: the first loss is the quantised base's alone.
    assert ranks.figures(run, "loss")[0] == pytest.approx(ranks.figures(one, "loss")[0], rel=ROUNDING)
    alike(one, run, BFLOAT16)


def test_each_rank_goes_on_with_its_own_dropout(tmp_path: Path) -> None:
    """Rows of unlike lengths have ranks draw unlike numbers of numbers: after a step their states differ."""
    setup = ranks.shared(SETUP.replace(lora_dropout=0.1), "ddp")
    whole = make_run(tmp_path, name="whole", setup=setup, max_steps=6, save_steps=3)
    assert ranks.trained(whole) == [0, 0]
    cut = RunFolder(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    shutil.rmtree(checkpoints.path_of(cut.checkpoints, 6))
    shutil.rmtree(cut.adapter)
    kept = checkpoints.path_of(cut.checkpoints, 3)
    one, other = ((kept / f"rng_state_{rank}.pth").read_bytes() for rank in range(2))
    assert one != other
    assert go_on(cut).from_step == 3
    assert ranks.trained(cut) == [0, 0]
    assert small_runs.differences(whole.adapter, cut.adapter) == []
    assert small_runs.differences(*(checkpoints.path_of(run.checkpoints, 6) for run in (whole, cut))) == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_two_shards_goes_on_with_another_number_of_processes(tmp_path: Path, count: int) -> None:
    rate: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "save_steps": 4}
    whole = make_run(tmp_path, name="whole", max_steps=STEPS, **rate)
    assert small_runs.trained(whole) == 0
    run = make_run(tmp_path, name="cut", max_steps=4, setup=ranks.shared(SETUP, "fsdp"), **rate)
    assert ranks.trained(run) == [0, 0]
    assert [event.step for event in events_of(run, CheckpointEvent)] == [4]
    setup = shared_by(run.read_job().setup, count, "ddp" if count > 1 else None)
    assert setup.effective_batch_size == SETUP.effective_batch_size
    go_on(run, setup=setup, max_steps=STEPS)
    assert (ranks.trained(run) if count > 1 else [small_runs.trained(run)]) == [0] * count
    assert ranks.figures(run, "loss") == pytest.approx(ranks.figures(whole, "loss"), rel=ROUNDING)
    assert close_files(whole.adapter, run.adapter)
