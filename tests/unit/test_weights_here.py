"""Weights that are missing, and models that are not planned, are told before anything takes time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.models import inspect
from launcher.runs.weights import require_weights
from launcher.tui import starting
from launcher.tui.cards import card_from_text
from launcher.tui.screens.start_run import RunWish
from launcher.tui.sizing import size_up
from planner.base.errors import InputError, MissingExtraError
from planner.models.catalog import resolve_model
from planner.models.inspectors import installed_inspector
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
GIB = 2**30
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
OWN = {  # a planned family's, of shapes that no model of the catalog has
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def written(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".").replace("_of_", "-of-")).write_text(text)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, where the network may be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def cached(hub: Path, repository: str, files: dict[str, object]) -> None:
    """A repository as the Hub's library lays it out in its cache."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_text(json.dumps(content))


def refused(cli: Cli, *arguments: object) -> str:
    done = cli(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    return str(done.err)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            [],
            "no weights in it (model.safetensors, or model.safetensors.index.json with the files that it",
        ),
        (
            ["pytorch_model.bin"],
            "its .bin files are pickles, which vramwise does not load: save the model as",
        ),
        (["model.gguf"], "GGUF is not trained: name the model that it was made from"),
        (["model.safetensors.index.json"], "2 of its 2 files of weights are missing: model-00001-of-00002"),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            "1 of its 2 files of weights are missing: model-00002-of-00002.safetensors",
        ),
    ],
)
def test_a_folder_without_its_weights_is_told_what_it_lacks(
    files: list[str], said: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps(INDEX))
    with pytest.raises(InputError) as caught:
        require_weights(str(tmp_path), download_bytes=None, allow_download=True)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": {}}}'])
def test_a_broken_index_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="is no index of weights"):
        require_weights(str(tmp_path), download_bytes=None, allow_download=False)


def test_a_folder_with_its_weights_is_accepted(tmp_path: Path) -> None:
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    for folder, names in (
        (whole, ["model.safetensors"]),
        (shards, ["model.safetensors.index.json", *INDEX["weight_map"].values()]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(json.dumps(INDEX))
        assert require_weights(str(folder), download_bytes=None, allow_download=False) is None


def test_a_repository_of_which_a_part_is_here_is_not_here(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def required(*, allow_download: bool, download_bytes: int | None = 3 * GIB) -> str | None:
        return require_weights("o/n", download_bytes=download_bytes, allow_download=allow_download)

    for name in (None, "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        if name is not None:
            cached(hub, "o/n", {name: INDEX})
        with pytest.raises(
            InputError, match=r"^the weights of o/n are not on this machine; --allow-download "
        ):
            required(allow_download=False)
        assert required(allow_download=True) == (
            "the weights of o/n are not on this machine: 3.0 GiB are fetched from the Hub"
        )
    with pytest.raises(InputError, match=r"--allow-download fetches them$"):
        required(allow_download=False, download_bytes=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="not on this machine; HF_HUB_OFFLINE is set"):
        required(allow_download=True)
    cached(hub, "o/n", {"model-00002-of-00002.safetensors": INDEX})
    assert required(allow_download=False) is None
    with pytest.raises(InputError, match="neither a folder here nor a Hub id"):
        require_weights("/models/mine", download_bytes=None, allow_download=True)


def test_train_asks_for_weights_before_a_model_is_described(
    cli: Cli, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that equals none of the catalog takes seconds to describe."""
    pytest.importorskip("trl")
    monkeypatch.setattr(inspect, "inspect_in_child", lambda *_, **__: pytest.fail("the model was described"))
    folder = written(tmp_path / "mine", config__json=OWN)
    asked = ("--gpu", "16GB", "--data", tmp_path / "none.jsonl")
    assert f"{folder}: no weights in it (model.safetensors" in refused(cli, "train", folder, *asked)
    cached(hub, "o/own", {"config.json": OWN})
    said = refused(cli, "train", "o/own", *asked)
    assert "the weights of o/own are not on this machine; --allow-download fetches them" in said
    said = refused(cli, "train", "unsloth/Qwen3-8B", *asked)
    assert (
        "the weights of unsloth/Qwen3-8B are not on this machine; --allow-download fetches 15.3 GiB" in said
    )


def test_the_terminal_interface_asks_for_them_too(hub: Path, tmp_path: Path) -> None:
    setup = TrainingSetup(model="qwen2.5-0.5b", max_length=512)
    sizing = size_up(setup, resolve_model(setup.model), card_from_text("16GB"))
    wish = RunWish(
        data=tmp_path / "none.jsonl",
        model_source="Qwen/Qwen2.5-0.5B",
        runs=tmp_path / "runs",
        num_train_epochs=1.0,
        max_steps=None,
    )
    with pytest.raises(
        InputError, match=r"Qwen/Qwen2.5-0.5B are not on this machine; --allow-download fetches 0.9"
    ):
        starting.start(sizing, wish)
    with pytest.raises(InputError, match=r"none.jsonl: cannot be read"):
        starting.start(sizing, wish, allow_download=True)
    assert not (tmp_path / "runs").exists()


def test_the_terminal_interface_has_the_flag_that_its_messages_name(
    cli: Cli, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXTUAL_DRIVER", "served")
    asked = ("tui", "--model", "nobody/nothing-7b")
    assert "--allow-download fetches its config.json" in refused(cli, *asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(cli, *asked, "--allow-download")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"adapter_config__json": {"base_model_name_or_path": "Qwen/Qwen3-8B"}},
            "it holds an adapter: plan its base model, 'Qwen/Qwen3-8B'",
        ),
        ({"adapter_config__json": "{"}, "it holds an adapter: plan its base model"),
        ({"model__gguf": ""}, "GGUF is not trained: name the model that it was made from"),
        ({}, "no config.json in"),
    ],
)
def test_a_folder_that_is_no_model_says_what_was_meant(
    files: dict[str, object], said: str, cli: Cli, tmp_path: Path
) -> None:
    assert said in refused(cli, "plan", written(tmp_path / "mine", **files), "16GB")


def test_a_gguf_file_is_told_what_to_name(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "qwen3-8b-q4.gguf").write_bytes(b"GGUF")
    said = refused(cli, "plan", tmp_path / "qwen3-8b-q4.gguf", "16GB")
    assert "is a file; GGUF is not trained: name the model that it was made from" in said


@pytest.mark.parametrize("model_type", ["mamba2", "what"])
def test_a_family_without_a_recipe_needs_the_stack_that_traces_it(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": model_type, "auto_map": {"AutoConfig": "c"}}
    folder = written(tmp_path / "some-8b", config__json=config)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    for inspector in (None, installed_inspector):
        with pytest.raises(MissingExtraError, match=r"vramwise\[train\]"):
            resolve_model(str(folder), inspector=inspector)


def test_what_transformers_cannot_build_is_told_as_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    died = inspect.subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: head_dim\n")
    monkeypatch.setattr(inspect.subprocess, "run", lambda *_, **__: died)
    said = r"^x/some-8b: transformers could not build the model: ValueError: head_dim; of about its size"
    with pytest.raises(InputError, match=said):
        inspect.inspect_in_child(OWN, model_id="some-8b", hub_id="x/some-8b")
