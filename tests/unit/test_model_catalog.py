"""The model catalog: what names find, what configs are recognised, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from planner.base import data_files
from planner.base.errors import InputError, MissingExtraError, UnknownNameError, VramwiseError
from planner.models import catalog as model_catalog
from planner.models.catalog import catalog_ids, list_models, load_shipped, resolve_model
from planner.models.spec import ModelSpec
from tests.each import for_each

PUBLISHED = tomllib.loads((data_files.PROFILES / "models.toml").read_text(encoding="utf-8"))["model"]
BY_ID = {entry["id"]: entry for entry in PUBLISHED}


@pytest.fixture(autouse=True)
def _own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "data"))


def published_config(model_id: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((data_files.PROFILES / "configs" / f"{model_id}.json").read_bytes())
    return values


def folder_with(tmp_path: Path, config: object) -> str:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_catalog_and_published_table_name_the_same_models() -> None:
    assert catalog_ids() == tuple(BY_ID)
    assert len(catalog_ids()) >= 60


@for_each(BY_ID)
def test_parameter_total_is_the_published_one(model_id: str) -> None:
    entry, spec = BY_ID[model_id], load_shipped(model_id)
    assert spec.parameter_count == entry["published_total"] - entry.get("stored_beside", 0)
    assert spec.download_bytes == 2 * spec.parameter_count
    assert entry["total_source"] in ("hub", "gguf", "keras", "code")
    assert ("stored_beside" in entry) == ("stored_what" in entry)


@pytest.mark.parametrize(
    ("model_id", "total"),
    [
        ("qwen2.5-14b", 14_770_033_664),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mistral-nemo-12b", 12_247_782_400),
        ("gemma-2-9b", 9_241_705_984),
        ("phi-4", 14_659_507_200),
    ],
)
def test_totals_people_know(model_id: str, total: int) -> None:
    assert resolve_model(model_id).parameter_count == total


@for_each(list_models, name=lambda summary: summary.id)
def test_summary_agrees_with_spec_and_every_name_finds_it(summary: model_catalog.ModelSummary) -> None:
    spec = load_shipped(summary.id)
    assert (summary.parameter_count, summary.hub_id) == (spec.parameter_count, spec.hub_id)
    for name in (summary.id, summary.hub_id, *summary.aliases):
        assert resolve_model(name, images=summary.sees_images) is spec


@pytest.mark.parametrize(
    ("typed", "model_id"),
    [
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("llama3.1-8b", "llama-3.1-8b"),
        ("llama_3_1_8b_instruct", "llama-3.1-8b"),
        ("QWEN2.5 14B Instruct", "qwen2.5-14b"),
        ("unsloth/Qwen2.5-14B-Instruct", "qwen2.5-14b"),
        ("qwen/qwen2.5-coder-7b", "qwen2.5-7b"),
        ("Phi4", "phi-4"),
        ("mistral-7b", "mistral-7b-v0.3"),
        ("DeepSeek-R1-Distill-Llama-70B", "llama-3.3-70b"),
    ],
)
def test_spellings(typed: str, model_id: str) -> None:
    assert resolve_model(typed).id == model_id


def test_typo_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean qwen2.5-14b"):
        resolve_model("qwen2.5-14bb")


def test_unknown_hub_id_uses_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def no_cache(*_: object, local_files_only: bool, **__: object) -> str:
        asked.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_cache)
    with pytest.raises(UnknownNameError, match="--allow-download fetches its config"):
        resolve_model("somebody/some-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownNameError, match="HF_HUB_OFFLINE is set"):
        resolve_model("somebody/some-model", allow_network=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="cannot get config"):
        resolve_model("somebody/some-model", allow_network=True)
    assert asked == [True, True, False]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "GatedRepoError",
            r"is gated: accept its terms at https://huggingface.co/somebody/gemma-3-4 and log in",
        ),
        (
            "RepositoryNotFoundError",
            r"neither in the catalog nor on the Hub, unless it is private\); did you mean",
        ),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    error = getattr(huggingface_hub.errors, kind)

    def refuse(*_: object, **__: object) -> str:
        raise error("401 Client Error.\nCannot access", response=mock.MagicMock())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=said):
        resolve_model("somebody/gemma-3-4", allow_network=True)


def test_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = Path(folder_with(tmp_path, published_config("phi-4"))) / "config.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    spec = resolve_model("somebody/phi-4-tuned")
    assert (spec.id, spec.hub_id) == ("phi-4", "somebody/phi-4-tuned")


@for_each(BY_ID)
def test_folder_with_a_published_config_needs_no_training_stack(model_id: str, tmp_path: Path) -> None:
    config = published_config(model_id) | {"torch_dtype": "bfloat16", "transformers_version": "4.46.0"}
    whole = load_shipped(model_id).tower is not None
    spec = resolve_model(folder_with(tmp_path, config), images=whole)
    expected = load_shipped(model_id)
    assert (spec.parameters, spec.layers) == (expected.parameters, expected.layers)
    assert spec.max_position_embeddings == expected.max_position_embeddings


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("num_hidden_layers", 12),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("sliding_window", 2048),
        ("use_sliding_window", True),
        ("an_unheard_of_switch", 1),
        ("model_type", "mistral"),
    ],
)
def test_folder_that_differs_is_not_taken_for_a_catalog_model(
    change: str, value: object, tmp_path: Path
) -> None:
    config = published_config("qwen2.5-7b")
    config.pop("sliding_window") if change == "sliding_window" else None
    config.pop("use_sliding_window") if change == "sliding_window" else None
    folder = folder_with(tmp_path, config | {change: value})
    with pytest.raises(MissingExtraError, match=r"vramwise\[train\]"):
        resolve_model(folder)
    made = load_shipped("phi-4")
    assert resolve_model(folder, inspector=lambda config, *, model_id, hub_id: made) is made


def test_folder_without_a_field_that_is_not_the_default_is_not_recognised(tmp_path: Path) -> None:
    config = published_config("qwen2.5-7b")
    del config["intermediate_size"]
    with pytest.raises(MissingExtraError):
        resolve_model(folder_with(tmp_path, config))


def test_multimodal_wrapper_is_recognised_by_its_text_model(tmp_path: Path) -> None:
    """The text_config of google/gemma-3-4b-it as published: only what differs from the defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    assert resolve_model(folder_with(tmp_path, config)).id == "gemma-3-4b"
    text["sliding_window"] = 512
    with pytest.raises(MissingExtraError):
        resolve_model(folder_with(tmp_path, config))


def test_fine_tuned_copy_with_another_context_keeps_its_own(tmp_path: Path) -> None:
    """Qwen2.5-14B-Instruct's config.json: other window fields that are switched off, a shorter context."""
    changes = {"max_window_layers": 70, "sliding_window": 131072, "max_position_embeddings": 32768}
    spec = resolve_model(folder_with(tmp_path, published_config("qwen2.5-14b") | changes))
    assert (spec.id, spec.max_position_embeddings) == ("qwen2.5-14b", 32768)


def test_inspected_model_of_the_user_is_found() -> None:
    spec = load_shipped("phi-4")
    path = model_catalog.user_spec_path("my_tune")
    data_files.write_atomically(path, json.dumps(spec.to_dict()))
    assert resolve_model("My Tune") == spec
    path.write_text("[1")
    with pytest.raises(InputError, match="not a model spec"):
        resolve_model("my-tune")


BAD_CONFIGS = {
    "empty": b"",
    "truncated": b'{"model_type": "llama", "hidden',
    "a list": b"[1, 2]",
    "not utf-8": b"\xff\xfe\x00{",
    "deep": b'{"model_type": "llama", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "rather deep": b'{"model_type": "llama", "a": ' + b"[" * 40 + b"]" * 40 + b"}",
    "huge": b'{"model_type": "llama", "a": "' + b"x" * 2_000_000 + b'"}',
    "NaN": b'{"model_type": "llama", "hidden_size": NaN}',
    "no model_type": b'{"hidden_size": 4096}',
    "model_type a number": b'{"model_type": 3}',
    "many layers": b'{"model_type": "llama", "num_hidden_layers": 10000000}',
    "no layers": b'{"model_type": "llama", "num_hidden_layers": 0}',
    "negative": b'{"model_type": "llama", "hidden_size": -1}',
    "fraction": b'{"model_type": "llama", "hidden_size": 40.5}',
    "text for a number": b'{"model_type": "llama", "hidden_size": "4096"}',
    "a number of 5,000 digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
    "quantised": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
    "steers attention": b'{"model_type": "llama", "_attn_implementation_internal": "x/y"}',
    "text_config without a type": b'{"model_type": "gemma3", "text_config": {"hidden_size": 1}}',
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("content", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        resolve_model(str(tmp_path))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["", "  ", "x" * 5000, "\x1b[31mred", "a/b/c", "no-such-model", "./no-such", "/"]
)
def test_bad_name_is_one_line(name: str) -> None:
    with pytest.raises(VramwiseError) as caught:
        resolve_model(name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_file_and_unreadable_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"no config.json"):
        resolve_model(str(tmp_path))
    file = tmp_path / "weights"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file"):
        resolve_model(str(file))


def test_spec_survives_json() -> None:
    spec = load_shipped("gemma-3-4b")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_lookup_is_light() -> None:
    code = (
        "import sys\n"
        "from planner.models.catalog import resolve_model\n"
        "resolve_model('qwen2.5-14b')\n"
        "heavy = ('torch', 'transformers', 'huggingface_hub', 'platformdirs')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
