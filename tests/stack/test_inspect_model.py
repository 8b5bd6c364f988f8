"""Inspection of real transformers models: the committed specs, the recipes' flags, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from launcher.models.inspect import inspect_config, inspect_in_child
from launcher.models.write_catalog import CONFIGS, describe, read_table, spec_text, write_catalog
from planner.base.errors import InputError
from planner.models.catalog import MODELS, load_shipped, resolve_model
from planner.models.spec import LayerSpec
from tests import describing
from tests.each import for_each

ENTRIES = {entry.id: entry for entry in read_table()}
# One of each family that the recipes know.
FAMILIES = (
    "llama-3.2-1b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
    "mistral-7b-v0.1",
    "mixtral-8x7b",
    "gemma-2b",
    "gemma-2-2b",
    "gemma-3-1b",
    "phi-4-mini",
    "smollm3-3b",
    "olmo-2-1b",
    "granite-3.3-2b",
)


def config_of(model_id: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((CONFIGS / f"{model_id}.json").read_bytes())
    return values


def only_layer(model_id: str) -> LayerSpec:
    (layer,) = load_shipped(model_id).layers
    return layer


@pytest.mark.parametrize("model_id", FAMILIES)
def test_committed_spec_is_what_the_installed_stack_gives(model_id: str) -> None:
    made = json.loads(spec_text(describe(ENTRIES[model_id], config_of(model_id))))
    committed = json.loads((MODELS / f"{model_id}.json").read_bytes())
    made.pop("source"), committed.pop("source")
    assert made == committed


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    assert list(write_catalog(["smollm2-135m"], tmp_path)) == ["wrote smollm2-135m.json"]
    assert list(write_catalog(["smollm2-135m"], tmp_path)) == []


def test_another_total_than_the_published_is_refused() -> None:
    config = config_of("smollm2-135m") | {"intermediate_size": 1535}
    with pytest.raises(InputError, match="published"):
        describe(ENTRIES["smollm2-135m"], config)


def test_flags_of_each_family() -> None:
    assert load_shipped("gemma-2-2b").default_attn_implementation == "eager"
    assert load_shipped("qwen2.5-0.5b").default_attn_implementation == "sdpa"
    gemma = load_shipped("gemma-2-2b").layers
    assert [layer.sliding_window for layer in gemma] == [4096, None]
    assert all(layer.attention_softcap and layer.output_norms and layer.input_norms for layer in gemma)
    assert load_shipped("gemma-2-2b").final_logit_softcapping
    assert load_shipped("gemma-2-2b").embedding_multiplier
    assert [layer.count for layer in load_shipped("gemma-3-1b").layers] == [22, 4]
    assert {layer.qk_norm for layer in load_shipped("gemma-3-1b").layers} == {"head"}
    assert load_shipped("gemma-3-1b").rotary_tables == 2
    olmo = only_layer("olmo-2-1b")
    assert (olmo.qk_norm, olmo.norm, olmo.input_norms, olmo.output_norms) == (
        "full",
        "rms_fp32_weight",
        False,
        True,
    )
    phi = only_layer("phi-4-mini")
    assert (phi.fused_qkv, phi.fused_gate_up, phi.rotary_dim, phi.rotary_concatenated) == (
        True,
        True,
        96,
        True,
    )
    granite = load_shipped("granite-3.3-2b")
    assert (granite.embedding_multiplier, granite.logit_scale) == (True, True)
    assert only_layer("granite-3.3-2b").residual_multiplier
    assert only_layer("mistral-7b-v0.1").sliding_window == 4096
    assert only_layer("mistral-7b-v0.3").sliding_window is None
    nope = next(layer for layer in load_shipped("smollm3-3b").layers if not layer.rotary)
    assert nope.indices == tuple(range(3, 36, 4))
    moe = only_layer("qwen3-30b-a3b")
    assert (moe.experts, moe.experts_per_token, moe.expert_intermediate_size) == (128, 8, 768)
    experts = [p for p in load_shipped("qwen3-30b-a3b").parameters if ".experts." in p.name]
    assert [(p.shape, p.count) for p in experts] == [((128, 1536, 2048), 48), ((128, 2048, 768), 48)]


@pytest.mark.parametrize(
    ("model_id", "kind"),
    [("llama-3.2-1b", "rms"), ("gemma-2-2b", "rms_fp32_weight"), ("olmo-2-1b", "rms_fp32_weight")],
)
def test_norm_kind_is_where_the_weight_is_multiplied(model_id: str, kind: str) -> None:
    """Run the family's norm in bfloat16 and look at the dtype in which its weight meets the input."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoConfig, AutoModelForCausalLM

    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.last: torch.dtype | None = None

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mul.Tensor and out.dim() == 2:
                self.last = out.dtype
            return out

    values = config_of(model_id) | {"num_hidden_layers": 1}
    model_type = values.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        norm = model.model.norm.to(torch.bfloat16)
        hidden = torch.zeros(2, values["hidden_size"], dtype=torch.bfloat16)
    with Products() as products:
        norm(hidden)
    assert load_shipped(model_id).final_norm == kind
    assert products.last == (torch.bfloat16 if kind == "rms" else torch.float32)


@for_each(ENTRIES)
def test_config_saved_by_the_installed_transformers_is_recognised(model_id: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    values = config_of(model_id)
    AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(tmp_path)
    assert resolve_model(str(tmp_path)).layers == load_shipped(model_id).layers


@pytest.mark.slow
def test_resolving_a_changed_llama_describes_it_in_a_child_without_its_code(tmp_path: Path) -> None:
    config = config_of("llama-3.2-1b") | {
        "num_hidden_layers": 3,
        "auto_map": {"AutoConfig": "evil--code.Config"},
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    spec = resolve_model(str(folder), inspector=inspect_in_child)
    assert (spec.id, spec.hub_id, spec.num_hidden_layers) == ("mine", str(folder), 3)
    assert spec.tied_embeddings


REFUSED = {
    "parts beside the layers": (
        {"model_type": "gemma3n_text"},
        "Gemma3nForCausalLM has no recipe, and cannot be traced: .*per_layer.* beside its layers",
    ),
    "no language model": ({"model_type": "siglip_vision_model"}, "no causal language model"),
    "unknown": ({"model_type": "what"}, "not known to the installed transformers"),
    "its own code": ({"model_type": "what", "auto_map": {"AutoConfig": "c.C"}}, "never run"),
    "residual dropout": ({"model_type": "phi3", "resid_pdrop": 0.1, "num_hidden_layers": 1}, "dropout"),
    "router jitter": ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
    "router loss": ({"model_type": "mixtral", "output_router_logits": True}, "output_router_logits"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect_config(config, model_id="x", hub_id="x")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "num_attention_heads": 7, "hidden_size": 64, "num_key_value_heads": 5},
        {"model_type": "llama", "hidden_act": "no-such-function"},
        {"model_type": "llama", "rope_parameters": {"rope_type": "nonsense"}},
        {"model_type": "qwen2", "layer_types": ["full_attention"], "num_hidden_layers": 4},
    ],
)
def test_config_that_transformers_cannot_build_is_one_line(config: dict[str, Any]) -> None:
    with describing.here(), pytest.raises(InputError, match="could not build the model") as caught:
        inspect_in_child(config, model_id="x", hub_id="x")
    assert "\n" not in str(caught.value)


def test_ten_million_layers_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(InputError, match="num_hidden_layers"):
        inspect_in_child({"model_type": "llama", "num_hidden_layers": 10_000_000}, model_id="x", hub_id="x")


@pytest.mark.slow
def test_child_is_ended_in_time_and_bounded_in_memory() -> None:
    config = config_of("llama-3.2-1b") | {"num_hidden_layers": 2}
    with pytest.raises(InputError, match="took more than"):
        inspect_in_child(config, model_id="x", hub_id="x", timeout_seconds=0.2)
    with pytest.raises(InputError, match="could not build"):
        inspect_in_child(config, model_id="x", hub_id="x", memory_bytes=2**27)


def test_importing_the_inspector_is_light() -> None:
    code = "import sys, launcher.models.inspect; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
