"""Messages that newcomers met and that led them nowhere: each says what is so and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.models.inspect import _FAMILIES
from planner.base import data_files
from planner.base.errors import InputError
from planner.models import hub_config
from planner.models.checkpoint import METHOD_NAMES
from planner.setup.knob import Knob
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup
from tests import describing
from tests.each import for_each

Cli = Callable[..., Any]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


def refused(cli: Cli, *arguments: object) -> str:
    done = cli(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    return str(done.err)


def folder(tmp_path: Path, config: str) -> Path:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unsloth/Qwen3-8B-bnb-4bit", "QLoRA quantises while loading: plan what it was made from, qwen3-8b"),
        ("unsloth/Qwen3-8B-bnb-4bit", "--allow-download fetches its config.json"),
        ("grok-20b", "of about its size there are gpt-oss-20b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "did you mean mistral-7b-v0.3"),
        ("llama-3.1-8", "did you mean llama-3.1-8b"),
    ],
)
def test_an_unknown_model_is_answered_with_what_can_be_planned(name: str, said: str, cli: Cli) -> None:
    assert said in refused(cli, "plan", name, "24GB")


def test_a_name_that_was_taken_for_another_is_told(cli: Cli) -> None:
    assert cli("plan", "llama3-8b", "24GB").out.startswith("FITS: llama3-8b (llama-3-8b) with")
    assert cli("plan", "Qwen/Qwen2.5-0.5B", "24GB").out.startswith("FITS: Qwen/Qwen2.5-0.5B with")
    assert "on 4090 (rtx-4090)\n" in cli("plan", "qwen2.5-0.5b", "4090").out


@pytest.mark.parametrize(("cards", "others"), [("2x24GB", "the other is"), ("4xa40", "the other 3 are")])
def test_a_plan_for_one_of_several_cards_says_so_at_once(cards: str, others: str, cli: Cli) -> None:
    out = " ".join(cli("plan", "qwen2.5-0.5b", cards, "--num-processes", 1).out.split())
    assert f"on one of {cards}" in out
    assert f"{others} not used" in out


def test_a_plan_for_several_cards_says_at_once_what_they_gain_and_what_the_others_lose(cli: Cli) -> None:
    out = " ".join(cli("plan", "llama-3.1-8b", "2x24GB", "--max-length", 512).out.split())
    assert "DDP on 2 GPUs, 1.9" in out
    assert "times one GPU's rate at this micro-batch; one GPU alone is" in out
    assert "% slower; FSDP2 is" in out


def test_sharing_takes_the_number_of_cards_from_gpu(cli: Cli) -> None:
    found = cli("plan", "llama-3.1-70b", "2xrtx-3090", "--distributed", "fsdp", "--max-length", 512)
    assert found.out.startswith("FITS")
    assert "x 2 GPUs (fsdp)" in found.out
    one = refused(cli, "plan", "llama-3.1-70b", "rtx-3090", "--distributed", "fsdp")
    assert "distributed needs num_processes of at least 2" in one


@pytest.mark.parametrize("more", [(), ("--full",)])
def test_a_price_has_its_source_and_date_or_is_said_to_be_unknown(more: tuple[str, ...], cli: Cli) -> None:
    def price(*arguments: str) -> str:
        out = " ".join(cli("plan", "qwen2.5-0.5b", *arguments, *more).out.split())
        return out[out.index(" price ") :][:120]

    assert "a GPU-hour (Akash, on-demand, 2026-09-20)" in price("rtx-4090")
    assert "not known for rtx-5060-ti-16gb (--price-per-hour USD)" in price("16GB")
    own = price("rtx-4090", "--price-per-hour", "2")
    assert "at $2 a GPU-hour" in own
    assert "Akash" not in own


@pytest.mark.parametrize(("epochs", "said"), [(1, "for 1 epoch, "), (2, "for 2 epochs, ")])
def test_one_epoch_is_one(epochs: int, said: str, cli: Cli) -> None:
    data = data_files.PROFILES / "demo" / "data" / "train.jsonl"
    out = cli("plan", "qwen2.5-0.5b", "24GB", "--data", data, "--epochs", epochs, "--full").out
    assert said in " ".join(out.split())


@pytest.mark.parametrize(("length", "told"), [(131072, False), (200000, True)])
def test_a_length_beyond_the_model_s_window_is_told(length: int, told: bool, cli: Cli) -> None:
    out = cli("plan", "qwen2.5-14b", "h200", "--max-length", length).out
    assert ("The model was made for 131,072 tokens" in out) is told


def test_calibrate_without_a_gpu_names_no_option_that_it_lacks(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = refused(cli, "calibrate")
    assert "calibrate measures a GPU of this machine, and there is none" in said
    assert "--gpu" not in said


def test_a_run_that_there_is_none_of_is_answered_with_those_that_are(cli: Cli, tmp_path: Path) -> None:
    assert f"(none are in {tmp_path}; --runs names another" in refused(
        cli, "runs", "stop", "nope", "--runs", tmp_path
    )
    for name in ("first-run", "second-run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text("{}")
    said = refused(cli, "runs", "follow", "frist-run", "--runs", tmp_path)
    assert "unknown run 'frist-run'; did you mean first-run" in said
    assert "first-run, second-run)" in said


def test_no_runs_here_says_where_here_is(cli: Cli, tmp_path: Path) -> None:
    done = cli("runs", "--runs", tmp_path)
    assert done.code == 0
    assert f"no runs in {tmp_path} (--runs names another folder)" in done.err


def test_a_config_may_have_numbers_without_an_end(tmp_path: Path) -> None:
    where = folder(tmp_path, json.dumps({**LLAMA, "time_step_limit": [0.0, float("inf")]}))
    assert "Infinity" in (where / "config.json").read_text()
    assert hub_config.read_config(where)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
def test_but_not_where_a_size_is_meant(value: str, tmp_path: Path, cli: Cli) -> None:
    text = json.dumps(LLAMA).replace('"hidden_size": 64', f'"hidden_size": {value}')
    assert value in text
    told = "NaN is not a number" if value == "NaN" else "hidden_size"
    assert told in refused(cli, "plan", folder(tmp_path, text), "24GB")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("llama", "give the model they were made from, which QLoRA quantises while loading"),
        ("qwen3_moe", "give the model they were made from"),
        ("minimax_m2", "vramwise plans neither these nor model_type minimax_m2 in 16 bits"),
    ],
)
def test_quantised_weights_send_nobody_on_an_errand_that_fails(
    model_type: str, said: str, tmp_path: Path, cli: Cli
) -> None:
    config = {**LLAMA, "model_type": model_type, "quantization_config": {"quant_method": "mxfp4"}}
    assert said in refused(cli, "plan", folder(tmp_path, json.dumps(config)), "24GB")


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        *(
            ({"quant_method": word}, f"quantised by {name}: give the model")
            for word, name in METHOD_NAMES.items()
        ),
        ({"quant_method": "aqlm"}, "quantised by 'aqlm': give the model they were made from"),
        ({"quant_algo": "W4A16"}, "quantised by compressed-tensors: give the model"),
        ({**BNB, "load_in_4bit": False}, "in neither 4 nor 8 bits"),
        ({**BNB, "bnb_4bit_quant_type": "int4"}, "expected nf4 or fp4, true or false"),
        ({**BNB, "bnb_4bit_quant_storage": "int32"}, "bnb_4bit_quant_storage is 'int32'"),
        ({**BNB, "llm_int8_skip_modules": ["("]}, "which names no module"),
        ({**BNB, "llm_int8_skip_modules": "lm_head"}, "not a list of modules"),
        ({**BNB, "llm_int8_skip_modules": ["down_proj"]}, "its output head is quantised too"),
        ([4], "quantization_config is [4], not an object"),
    ],
)
def test_stored_weights_that_are_not_trained_are_refused_by_name(
    stored: object, said: str, tmp_path: Path, cli: Cli
) -> None:
    # The shapes of a model of the catalog: nothing has to be described.
    config = {**config_of("smollm2-135m"), "quantization_config": stored}
    assert said in refused(cli, "plan", folder(tmp_path, json.dumps(config)), "24GB")


def config_of(model_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (data_files.PROFILES / "configs" / f"{model_id}.json").read_text(encoding="utf-8")
    )
    return found


def test_stored_4_bit_weights_are_planned_as_they_are(tmp_path: Path, cli: Cli) -> None:
    """Knobs that nobody asked for are the folder's; those that contradict it are refused by name."""
    four = {**BNB, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head", "model.layers.3.mlp"]}
    place = folder(tmp_path, json.dumps({**config_of("smollm2-135m"), "quantization_config": four}))
    plan = json.loads(cli("plan", place, "24GB", "--json").out)
    setup = plan["setup"]
    assert (setup["method"], setup["bnb_4bit_quant_type"], setup["bnb_4bit_use_double_quant"]) == (
        "qlora",
        "fp4",
        False,
    )
    assert {row["method"] for row in plan["methods"]} == {"qlora"}
    assert any("are stored in 4 bits" in note["text"] for note in plan["notes"])
    kept = 3 * 576 * 1536 * 2
    assert component(plan, "weights_unquantized") - kept == pytest.approx(49152 * 576 * 2, rel=0.01)
    said = refused(cli, "plan", place, "24GB", "--method", "lora")
    assert "is stored in 4: name the model that it was made from" in said
    said = refused(cli, "plan", place, "24GB", "--bnb-4bit-quant-type", "nf4")
    assert "expected fp4, as" in said
    setups = tmp_path / "setups.jsonl"
    setups.write_text(json.dumps({"model": str(place), "max_length": 512}) + "\n")
    estimated = json.loads(cli("estimate", "--gpu", "24GB", "--setups", setups, "--json").out)
    assert estimated["setup"]["bnb_4bit_quant_type"] == "fp4"


def test_stored_8_bit_weights_are_planned_in_8_bits(tmp_path: Path, cli: Cli) -> None:
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    place = folder(tmp_path, json.dumps({**config_of("smollm2-135m"), "quantization_config": eight}))
    stored, loaded = (
        json.loads(cli("plan", model, "24GB", "--json", *more).out)
        for model, more in ((place, ()), ("smollm2-135m", ("--load-in-8bit",)))
    )
    for plan in (stored, loaded):
        assert plan["setup"]["load_in_8bit"]
        # Of 30 layers the seven linear ones: attention's four and the MLP's three.
        assert component(plan, "weights_4bit") == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
        assert plan["speed"] is None
        assert not plan["setup"]["activation_offloading"]
    assert component(stored, "weights_4bit") == component(loaded, "weights_4bit")
    said = refused(cli, "plan", place, "24GB", "--no-load-in-8bit")
    assert "load_in_8bit: 'false' is not accepted; expected true, as" in said


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (("--load-in-8bit", "--use-dora"), "DoRA fails on weights in 8 bits (PEFT 0.21.2)"),
        (("--load-in-8bit", "--compile", "regional"), "compile=regional with load_in_8bit"),
        (("--load-in-8bit", "--dtype", "float16"), "load_in_8bit=true with dtype"),
        (("--load-in-8bit", "--method", "lora"), "load_in_8bit applies to qlora"),
        (("--loraplus-lr-ratio", "8", "--optim", "adamw_torch"), "needs another optim"),
        (("--loraplus-lr-ratio", "0.5"), "1 to 1000"),
    ],
)
def test_variants_that_do_not_go_together_are_refused(knobs: tuple[str, ...], said: str, cli: Cli) -> None:
    assert said in refused(cli, "plan", "smollm2-135m", "24GB", *knobs)


@for_each([(knob, word, why) for knob in KNOBS for word, why in knob.refused], name=lambda one: one[1])
def test_what_cannot_work_is_refused_with_why_and_since_which_release(
    refusal: tuple[Knob, str, str], cli: Cli
) -> None:
    knob, word, why = refusal
    assert re.search(r"\d+\.\d", why), "no release"
    told = refused(cli, "plan", "smollm2-135m", "24GB", f"--{knob.name.replace('_', '-')}", word)
    assert told == f"vramwise: {knob.name} {word}: {why}\n"
    with pytest.raises(InputError, match=re.escape(why)):
        TrainingSetup(model="m", max_length=8, **{knob.name: word})


def component(plan: dict[str, Any], name: str) -> int:
    return next(one["size_bytes"] for one in plan["memory"]["components"] if one["name"] == name)


def test_the_planned_types_are_those_of_the_catalog() -> None:
    known = set()
    for path in (data_files.PROFILES / "configs").glob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        known |= {config["model_type"], config.get("text_config", config).get("model_type", "llama")}
    assert known - {"mistral3"} <= hub_config.PLANNED_TYPES
    assert len({name.removesuffix("_text") for name in hub_config.RECIPE_TYPES}) == len(_FAMILIES)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "cannot be traced"),
        (
            {"model_type": "qwen2_5_vl", "text_config": {**LLAMA, "model_type": "qwen2_5_vl_text"}},
            "qwen2_5_vl_text is the text part of a vision-language model",
        ),
    ],
)
def test_a_refused_architecture_says_whose_limit_it_is(
    config: dict[str, Any], said: str, tmp_path: Path, cli: Cli
) -> None:
    pytest.importorskip("transformers")
    where = tmp_path / "some-20b"
    where.mkdir()
    with describing.here():
        refusal = refused(cli, "plan", folder(where, json.dumps({**LLAMA, **config})), "24GB")
    assert said in refusal
    assert "of about its size there are" in refusal


def test_weights_that_are_not_here_are_told_before_anything_is_read(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refused(cli, "train", "qwen2.5-14b", "--gpu", "24GB", "--data", tmp_path / "none.jsonl")
    assert "weights of Qwen/Qwen2.5-14B are not on this machine; --allow-download fetches 27.5 GiB" in said
