"""What CONTRIBUTING.md says of a model and of a family, with transformers' own classes.

A made-up model is described and written to a catalog, found there and estimated. A made-up family is traced;
read as a recipe it is refused by the name of each class that is not listed, and planned in the same bytes
once all are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from launcher.models import inspect, layer_recipe, write_catalog
from launcher.models.inspect import inspect_config
from planner.base.errors import InputError
from planner.memory import estimate_memory
from planner.models import catalog
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

SHAPES = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
LLAMA = {"model_type": "llama", **SHAPES}
# Embedding and head, and of each layer: q and o, k and v, the MLP's three, two norms; then the last norm.
TOTAL = 2 * 32_000 * 512 + 3 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1536 + 2 * 512) + 512
ROW = f"""
[[model]]
id = "orbit-41m"
hub_id = "orbit/Orbit-41M"
aliases = ["little-orbit"]
published_total = {TOTAL}
total_source = "code"
"""


class OrbitConfig(LlamaConfig):
    model_type = "orbit"


class OrbitRMSNorm(llama.LlamaRMSNorm): ...


class OrbitAttention(llama.LlamaAttention): ...


class OrbitMLP(llama.LlamaMLP): ...


class OrbitDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, config: OrbitConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = OrbitAttention(config, layer_idx)
        self.mlp = OrbitMLP(config)
        self.input_layernorm = OrbitRMSNorm(config.hidden_size)
        self.post_attention_layernorm = OrbitRMSNorm(config.hidden_size)


class OrbitForCausalLM(llama.LlamaForCausalLM):
    config_class = OrbitConfig

    def __init__(self, config: OrbitConfig) -> None:
        super().__init__(config)
        layers = (OrbitDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.model.layers = torch.nn.ModuleList(layers)
        self.model.norm = OrbitRMSNorm(config.hidden_size)


def peak_bytes(spec: ModelSpec) -> int:
    setup = TrainingSetup(model=spec.id, max_length=1024)
    return estimate_memory(TrainingRun(setup=setup, model=spec)).peak_bytes


@pytest.fixture
def made_up_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of one model; it and the config are read, and specs written and looked up, in tmp_path."""
    table, written = tmp_path / "models.toml", tmp_path / "models"
    table.write_text(ROW, encoding="utf-8")
    read = write_catalog.read_table
    remembered = (catalog._index, catalog._configs, catalog.load_shipped)
    with monkeypatch.context() as patch:
        patch.setattr(write_catalog, "CONFIGS", tmp_path)
        patch.setattr(write_catalog, "read_table", lambda: read(table))
        patch.setattr(catalog, "MODELS", written)
        for cached in remembered:
            cached.cache_clear()
        yield written
    for cached in remembered:
        cached.cache_clear()


def test_a_made_up_model_is_written_found_and_estimated(made_up_catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "orbit-41m.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    wrote = list(write_catalog.write_catalog(None, made_up_catalog))
    assert wrote == ["wrote orbit-41m.json", "wrote index.json", "wrote configs.json"]
    assert [model.id for model in catalog.list_models()] == ["orbit-41m"]
    spec = catalog.resolve_model("Orbit 41M")
    assert spec.parameter_count == TOTAL
    assert catalog.resolve_model("little orbit") is catalog.resolve_model("orbit/Orbit-41M") is spec
    # A folder whose config.json equals the model's needs no transformers any more.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert catalog.resolve_model(str(tmp_path / "mine")).layers == spec.layers
    assert peak_bytes(spec) == peak_bytes(inspect_config(LLAMA, model_id="orbit-41m", hub_id="any"))


def test_a_made_up_model_of_another_size_than_published_is_not_written(
    made_up_catalog: Path, tmp_path: Path
) -> None:
    (tmp_path / "orbit-41m.json").write_text(json.dumps({**LLAMA, "hidden_size": 1024}), encoding="utf-8")
    with pytest.raises(InputError, match=r"^orbit-41m: [\d,]+ parameters built, [\d,]+ published$"):
        list(write_catalog.write_catalog(None, made_up_catalog))
    assert not made_up_catalog.exists()


def test_a_made_up_family_is_traced_and_its_recipe_refused_by_name_until_each_class_is_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    AutoConfig.register("orbit", OrbitConfig, exist_ok=True)
    AutoModelForCausalLM.register(OrbitConfig, OrbitForCausalLM, exist_ok=True)
    config = {"model_type": "orbit", **SHAPES}

    def refused(what: str) -> None:
        with pytest.raises(InputError, match=f"{what} is not understood$"):
            inspect_config(config, model_id="mine", hub_id="mine")

    traced = inspect_config(config, model_id="mine", hub_id="mine")
    assert traced.is_traced
    monkeypatch.setattr(inspect, "_MODELS", inspect._MODELS | {"OrbitForCausalLM"})
    refused("decoder layer OrbitDecoderLayer")
    norms = layer_recipe.DECODER_LAYERS["LlamaDecoderLayer"]
    monkeypatch.setitem(layer_recipe.DECODER_LAYERS, "OrbitDecoderLayer", norms)
    refused("norm OrbitRMSNorm")
    monkeypatch.setitem(layer_recipe.NORMS, "OrbitRMSNorm", "rms")
    refused("attention OrbitAttention")
    monkeypatch.setitem(layer_recipe._ATTENTIONS, "OrbitAttention", layer_recipe._Attention())
    refused("MLP OrbitMLP")
    monkeypatch.setattr(layer_recipe, "_GATED_MLPS", layer_recipe._GATED_MLPS | {"OrbitMLP"})

    spec = inspect_config(config, model_id="mine", hub_id="mine")
    twin = inspect_config(LLAMA, model_id="mine", hub_id="mine")
    assert (spec.architecture, spec.model_type) == ("OrbitForCausalLM", "orbit")
    named = replace(spec, architecture=twin.architecture, model_type="llama", parameters=twin.parameters)
    assert named == twin
    assert peak_bytes(spec) == peak_bytes(twin) == peak_bytes(traced)

    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = make_plan(make_request(str(tmp_path), gpu="16GB"), inspector=inspect_config)
    assert plan.fits
    assert plan.model.architecture == "OrbitForCausalLM"
