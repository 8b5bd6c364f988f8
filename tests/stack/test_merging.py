"""What is merged tensor by tensor is what PEFT merges with the whole model in memory, to the bit."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher import cli as launcher_cli
from launcher.merging import measuring, needs, serving, writing
from launcher.merging.adapter_folder import read_adapter
from launcher.merging.adapters import Adapters, Rounding
from launcher.merging.measuring import Comparison, Measuring, better
from launcher.merging.merge import Merge
from launcher.merging.task import MergeTask, MergeWish, read_task
from launcher.runs.folder import create_run_folder
from launcher.runs.report.serving import vllm_rank
from launcher.runs.training_job import TrainingJob
from launcher.training import build, dataset
from launcher.training.loading.base_folder import find_base
from planner.base.data_files import PROFILES
from planner.base.errors import InputError
from planner.commands.program import guarded
from planner.setup.training_setup import TrainingSetup
from tests.each import for_each
from tests.stack.small_models import FAMILIES

DEMO = PROFILES / "demo" / "model"
EVAL = PROFILES / "demo" / "data" / "eval.jsonl"
CPU = torch.device("cpu")
SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 64}
EXPERTS = {"moe_intermediate_size": 96}
KINDS = (
    ("llama", {}),
    ("llama", {"use_dora": True}),
    ("llama", {"use_rslora": True}),
    ("phi3", {}),
    ("qwen2", {"target_modules": ["q_proj", "down_proj"]}),
    ("qwen3_moe", {}),
    ("mixtral", {"use_rslora": True}),
)


@pytest.fixture(scope="module", autouse=True)
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@functools.cache
def base_of(family: str, place: Path) -> Path:
    """A small random model on disk, in bfloat16."""
    torch.manual_seed(0)
    sizes = {**FAMILIES[family], **SMALL, **(EXPERTS if "moe_intermediate_size" in FAMILIES[family] else {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(place / family)
    return place / family


def adapter_on(base: Path, target: Path, *, spread: float = 0.05, seed: int = 1, **options: Any) -> Path:
    """An adapter whose product is not zero, saved by PEFT in bfloat16 as a QLoRA run saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + spread * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, spread)
                parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(target)
    return target


def merged_by_us(
    model: Path, adapters: list[Path], target: Path, *, weights: tuple[float, ...] = (), **options: Any
) -> Rounding:
    target.mkdir()
    merge = merge_of(model, adapters, target / "unused", weights=weights, **options)
    return merge._write(target / "merged", merge.task.kinds[0], Silent())


def merge_of(model: Path, adapters: list[Path], output: Path, **wish: Any) -> Merge:
    chosen: dict[str, Any] = {"base": "original", "measured": False, "model": str(model), **wish}
    shard_bytes = chosen.pop("shard_bytes", 10**9)
    task = read_task(MergeWish(folder=adapters[0], adapters=tuple(adapters[1:]), output=output, **chosen))
    return merge_for(task, shard_bytes=shard_bytes)


def merge_for(task: MergeTask, *, shard_bytes: int = 10**9) -> Merge:
    base = find_base(task.source, allow_download=False)
    rows = [] if task.data is None else measuring.measured_rows(task, base, allow_download=False)
    attached = Adapters(task.adapters, task.weights).attach(base)
    return Merge(task=task, base=base, adapters=attached, rows=rows, shard_bytes=shard_bytes)


class Silent:
    def phase(self, text: str) -> None:
        pass

    def shards(self, done: int, total: int) -> None:
        pass


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def saved(model: Any, place: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(place)
    return weights_in(place)


@for_each(KINDS)
def test_the_result_is_pefts_own_to_the_bit(kind: tuple[str, dict[str, Any]], folder: Path) -> None:
    family, options = kind
    place = folder / f"{family}-{'-'.join(options)}"
    base = base_of(family, folder)
    adapter = adapter_on(base, place / "adapter", **options)
    merged_by_us(base, [adapter], place / "ours")
    ours = weights_in(place / "ours" / "merged")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload().to(torch.bfloat16)
    theirs = saved(merged, place / "theirs")
    assert set(ours) == set(theirs) == set(weights_in(base))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    changed = [name for name, value in weights_in(base).items() if not torch.equal(value, ours[name])]
    assert changed, "an adapter that changes nothing proves nothing"
    if family in ("qwen3_moe", "mixtral"):
        assert sum(".experts." in name for name in changed) == 2 * 4 * 3


def test_a_quantised_base_is_merged_as_peft_merges_it_dequantised(folder: Path) -> None:
    base = base_of("llama", folder)
    adapter = adapter_on(base, folder / "nf4" / "adapter")
    rounding = merged_by_us(base, [adapter], folder / "nf4" / "ours", base="dequantised")
    ours = weights_in(folder / "nf4" / "ours" / "merged")
    setup = TrainingSetup(model="llama", max_length=8)
    model = build.load_model(setup, str(base), device=CPU, allow_download=False)
    whole = model.dequantize().float()
    merged = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload().to(torch.bfloat16)
    theirs = saved(merged, folder / "nf4" / "theirs")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert rounding.share == pytest.approx(1, abs=0.01)
    original = weights_in(base)
    moved = ours["model.layers.0.mlp.up_proj.weight"].float() - original["model.layers.0.mlp.up_proj.weight"]
    assert moved.norm() > 0.05 * original["model.layers.0.mlp.up_proj.weight"].float().norm()
    for kept in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(ours[kept], original[kept])


def test_several_adapters_are_added_up_as_peft_concatenates_them(folder: Path) -> None:
    base = base_of("llama", folder)
    one = adapter_on(base, folder / "sum" / "one")
    two = adapter_on(base, folder / "sum" / "two", seed=2, r=8, target_modules=["q_proj", "up_proj"])
    merged_by_us(base, [one, two], folder / "sum" / "ours", weights=(0.7, -0.5))
    ours = weights_in(folder / "sum" / "ours" / "merged")
    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(whole, str(one), adapter_name="one")
    model.load_adapter(str(two), "two")
    model.add_weighted_adapter(["one", "two"], [0.7, -0.5], "both", combination_type="cat")
    model.set_adapter("both")
    theirs = saved(model.merge_and_unload(adapter_names=["both"]), folder / "sum" / "theirs")
    for name, expected in theirs.items():
        # Their sum is taken in another order: an ulp of float32 apart, which may round to the other side.
        torch.testing.assert_close(ours[name].float(), expected, rtol=2**-8, atol=1e-6)
    assert not torch.equal(ours["model.layers.0.self_attn.k_proj.weight"], weights_in(base)["lm_head.weight"])


def test_a_change_below_the_steps_of_bfloat16_is_seen_to_be_lost(folder: Path) -> None:
    base = base_of("llama", folder)
    tiny = adapter_on(base, folder / "tiny" / "adapter", spread=0.002)
    merge = merge_of(base, [tiny], folder / "tiny" / "out")
    with pytest.raises(InputError, match=r"rounding to bfloat16 leaves \d+% of what the adapter changes"):
        merge.run(CPU, merge.needs(), Silent())
    assert sorted(path.name for path in (folder / "tiny").iterdir()) == ["adapter"]


def test_shards_are_as_large_as_asked_and_load_again(folder: Path) -> None:
    base = base_of("qwen3_moe", folder)
    place = folder / "shards"
    adapter = adapter_on(base, place / "adapter", target_modules=["q_proj"])
    merge = merge_of(base, [adapter], place / "out", shard_bytes=300_000)
    merge.run(CPU, merge.needs(), Silent())
    files = sorted((place / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 310_000 for file in files)
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    found = weights_in(place / "out")
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert {path.suffix for path in (place / "out").iterdir()} == {".safetensors", ".json", ""}
    loaded = AutoModelForCausalLM.from_pretrained(place / "out")
    assert loaded.dtype == torch.bfloat16
    merged_by_us(base, [adapter], place / "whole")
    whole = weights_in(place / "whole" / "merged")
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def test_a_checkpoint_in_float32_becomes_one_of_16_bits(folder: Path) -> None:
    base = base_of("llama", folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(folder / "wide" / "base")
    adapter = adapter_on(base, folder / "wide" / "adapter")
    merged_by_us(folder / "wide" / "base", [adapter], folder / "wide" / "ours")
    merged_by_us(base, [adapter], folder / "wide" / "narrow")
    ours, narrow = (weights_in(folder / "wide" / name / "merged") for name in ("ours", "narrow"))
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert [name for name in ours if not torch.equal(ours[name], narrow[name])] == []
    assert (
        json.loads((folder / "wide" / "ours" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    )


def demo_run(place: Path, *, method: str = "qlora", **options: Any) -> Path:
    """A run folder of the demo as training leaves it, with an adapter that changes what the model says."""
    setup = TrainingSetup(model="demo", max_length=96, method=method)
    job = TrainingJob(setup=setup, model_source=str(DEMO), data_path=str(EVAL), assistant_only_loss=True)
    run = create_run_folder(place, job, name="run")
    adapter_on(DEMO, run.adapter, **{"spread": 0.03, **options})
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = "{# the run's own #}" + tokenizer.chat_template
    tokenizer.save_pretrained(run.adapter)
    return run.path


def test_both_ways_are_measured_and_the_nearer_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MEASURED_EXAMPLES", 8)
    run = demo_run(tmp_path)
    task = read_task(MergeWish(folder=run))
    merge = merge_for(task)
    made = merge.run(CPU, merge.needs(), Silent())
    by_kind = {way.kind: way.comparison for way in made.ways}
    assert list(by_kind) == ["dequantised", "original"]
    assert made.reference is not None
    near, far = by_kind["dequantised"], by_kind["original"]
    assert near is not None
    assert far is not None
    # NF4 moves the weights by 9% of their norm; rounding to bfloat16 by 0.2%.
    assert near.kl < far.kl / 20 < made.reference.untrained.kl / 20
    assert near.mean_logit < far.mean_logit < made.reference.untrained.mean_logit
    assert near.same_top > 0.97
    assert near.loss == pytest.approx(made.reference.loss, abs=0.01)
    assert made.kept.kind == ("dequantised" if better(near, far) else "original")
    out = run / "merged"
    facts = json.loads((out / "merge.json").read_text())
    assert facts["merged_into"] == made.kept.kind
    assert facts["measured"]["dequantised"]["kl"] == near.kl
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "job.json", "merged"]


def test_what_is_measured_is_what_transformers_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MEASURED_EXAMPLES", 8)
    run = demo_run(tmp_path, method="lora")
    other = adapter_on(DEMO, tmp_path / "other", seed=2, target_modules=["v_proj", "up_proj"])
    merge = merge_for(read_task(MergeWish(folder=run, adapters=(other,), weights=(1.0, 0.5))))
    made = merge.run(CPU, merge.needs(), Silent())
    (way,) = made.ways
    assert way.kind == "original"
    assert way.comparison is not None
    assert made.reference is not None
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    losses, tokens = 0.0, 0
    for row in merge.rows:
        labels = torch.tensor([row.labels])
        learned = int((labels[:, 1:] != dataset.NOT_LEARNED).sum())
        with torch.inference_mode():
            losses += float(model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss) * learned
        tokens += learned
    assert way.comparison.loss == pytest.approx(losses / tokens, rel=1e-3)
    assert len(way.comparison.token_losses) == tokens
    assert tokens <= measuring.MEASURED_TOKENS
    assert way.comparison.kl < made.reference.untrained.kl / 20


def test_the_tokenizer_is_the_adapters_and_the_configs_are_the_bases(tmp_path: Path) -> None:
    run = demo_run(tmp_path)
    merge = merge_for(read_task(MergeWish(folder=run, base="dequantised", measured=False)))
    merge.run(CPU, merge.needs(), Silent())
    out = run / "merged"
    config = json.loads((out / "config.json").read_text())
    assert config == {**json.loads((DEMO / "config.json").read_text()), "dtype": "bfloat16"}
    assert "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(out).chat_template.startswith("{# the run's own #}")
    assert GenerationConfig.from_pretrained(out).eos_token_id == config["eos_token_id"]
    assert (out / "Modelfile").read_text() == "FROM .\n"
    assert oct((out / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_a_merged_model_without_room_is_read_from_disk_and_measures_the_same(tmp_path: Path) -> None:
    run = demo_run(tmp_path, method="lora")
    merge = merge_for(read_task(MergeWish(folder=run)))
    merge.run(CPU, merge.needs(), Silent())
    rows = merge.rows[:2]
    found = []
    for free in (10**9, 2_000_000):
        where = Measuring(merge.task, merge.base, rows, CPU, free_bytes=free)
        reference = where.reference()
        found.append(where.compare(run / "merged", reference, spill=tmp_path / "spill"))
        placed = where._placed(writing.written_bytes(merge.base), tmp_path / "spill")
        assert ("max_memory" in placed) == (free < 10**9)
    assert found[0].token_losses == found[1].token_losses


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_leaves_nothing(at: int, tmp_path: Path) -> None:
    run = demo_run(tmp_path)
    left = run / ".merged.partial"
    left.mkdir()
    (left / "of-a-killed-merge").write_text("x")
    merge = merge_for(
        read_task(MergeWish(folder=run, base="dequantised", measured=False)), shard_bytes=1_000_000
    )

    class Interrupting(Silent):
        def shards(self, done: int, total: int) -> None:
            assert not (left / "of-a-killed-merge").exists()
            assert not (run / "merged").exists()
            if done == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge.run(CPU, merge.needs(), Interrupting())
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "job.json"]


def test_two_merges_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        writing.hidden_folder(tmp_path / "out"),
        pytest.raises(InputError, match="another merge is writing"),
        writing.hidden_folder(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_better_has_the_lower_loss_or_where_that_is_chance_the_smaller_divergence() -> None:
    def one(losses: list[float], kl: float) -> Comparison:
        mean = sum(losses) / len(losses)
        figures = {"same_top": 1.0, "mean_logit": 0.0, "max_logit": 0.0}
        return Comparison(loss=mean, kl=kl, token_losses=tuple(losses), **figures)

    steady = one([1.0, 2.0, 3.0, 4.0], kl=0.5)
    assert better(one([0.9, 1.9, 2.8, 3.9], kl=0.9), steady)
    assert not better(steady, one([0.9, 1.9, 2.8, 3.9], kl=0.9))
    scattered = one([2.0, 1.0, 4.0, 2.9], kl=0.1)
    assert scattered.loss < steady.loss
    assert better(scattered, steady)
    assert better(steady, one([2.0, 1.0, 4.0, 2.9], kl=0.9))


def test_needs_grow_with_shards_examples_and_ways(tmp_path: Path) -> None:
    run = demo_run(tmp_path)
    weights = (DEMO / "model.safetensors").stat().st_size
    both = merge_for(read_task(MergeWish(folder=run))).needs()
    one = merge_for(read_task(MergeWish(folder=run, base="original", measured=False))).needs()
    assert both.disk_bytes == 2 * one.disk_bytes
    assert one.disk_bytes == pytest.approx(weights, rel=0.01)
    assert both.answers_bytes == 3 * 4 * 512 * sum(
        len(measuring.learned_places(row)) for row in merge_for(read_task(MergeWish(folder=run))).rows
    )
    assert one.writing_bytes > needs.PROCESS_BYTES + weights
    small = merge_for(read_task(MergeWish(folder=run)), shard_bytes=1_000_000).needs()
    assert both.writing_bytes - small.writing_bytes == pytest.approx(weights - 1_000_000, rel=0.01)


Refusal = tuple[str, Callable[[Path], None], str]


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def set_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return changed


def _broken(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _in_bytes(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.int8)


def _of_another(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = torch.zeros(4, 96)


def _with_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def _untrained(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def _in_another_layer(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "layers.1." in name)
    tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def _pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


REFUSALS: tuple[Refusal, ...] = (
    (
        "modules_to_save",
        set_config(modules_to_save=["lm_head"]),
        "modules_to_save=['lm_head']: a merge would",
    ),
    ("bias", set_config(bias="all"), "bias='all': a merge would lose the trained biases"),
    (
        "start",
        set_config(init_lora_weights="pissa"),
        "init_lora_weights='pissa': it was trained beside a changed",
    ),
    ("kind", set_config(peft_type="IA3"), "peft_type='IA3': LoRA, DoRA and rsLoRA are merged"),
    ("future", set_config(use_newest=True), "'use_newest' of adapter_config.json is not known"),
    ("nan", set_tensors(_broken), "is not finite: the run diverged"),
    ("int8", set_tensors(_in_bytes), "is stored as int8; float32, bfloat16 and float16 are merged"),
    ("shape", set_tensors(_of_another), "it does not fit"),
    ("head", set_tensors(_with_head), "lm_head.weight' is a whole weight and not the base's"),
    ("zero", set_tensors(_untrained), "every lora_B is zero: the adapter changes nothing"),
    ("layer", set_tensors(_in_another_layer), "it does not fit"),
    ("pickle", _pickled, "adapter_model.bin is a pickle; only safetensors are loaded"),
)


@for_each(REFUSALS, name=lambda refusal: refusal[0])
def test_what_a_merge_would_lose_is_refused_by_name(refusal: Refusal, folder: Path) -> None:
    name, change, said = refusal
    base = base_of("llama", folder)
    adapter = adapter_on(base, folder / "refused" / name)
    change(adapter)
    with pytest.raises(InputError) as refused:
        merge_of(base, [adapter], folder / "refused" / f"{name}-out")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_adapter_on_a_shared_weight_is_refused(folder: Path) -> None:
    base = base_of("qwen2", folder)
    adapter = adapter_on(base, folder / "tied", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        InputError, match=r"adapts model.embed_tokens.weight, which embedding and output head share"
    ):
        merge_of(base, [adapter], folder / "tied-out")


def test_magnitudes_are_not_added_up(folder: Path) -> None:
    base = base_of("llama", folder)
    one = adapter_on(base, folder / "dora" / "one", use_dora=True)
    two = adapter_on(base, folder / "dora" / "two")
    with pytest.raises(InputError, match="DoRA's magnitudes do not allow"):
        merge_of(base, [two, one], folder / "dora" / "out")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`vramwise merge ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = guarded("vramwise", lambda: launcher_cli.run(["merge", *(str(one) for one in arguments)]))
        return Said(code, *capsys.readouterr())

    return run


def refused(said: Said) -> str:
    last = said.err.splitlines()[-1]
    assert (said.code, said.out) == (2, ""), said.err
    assert "Traceback" not in said.err
    return last.removeprefix("vramwise: ")


def test_the_command_tells_what_it_needs_how_it_answers_and_how_to_serve_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MEASURED_EXAMPLES", 4)
    run = demo_run(tmp_path, r=20)
    said = cli(run, "--max-shard-size", "3MB")
    assert said.code == 0, said.err
    assert re.search(r"^needs \d\.\d\d GiB of host memory and 0\.01 GiB of disk$", said.err, re.MULTILINE)
    assert "merging (dequantised): shard 1 of 2\nmerging (dequantised): shard 2 of 2\n" in said.err
    for line in (
        f"vllm serve {run}/merged",
        f"vllm serve {DEMO} --enable-lora --lora-modules run={run}/adapter --max-lora-rank 32",
        f"(cd {run}/merged && ollama create run)",
        f"python convert_hf_to_gguf.py {run}/merged --outfile run.gguf --outtype auto",
        f"python convert_lora_to_gguf.py {run}/adapter --base {DEMO} --outfile run-lora.gguf",
    ):
        assert re.search(rf"^ .* {re.escape(line)}$", said.out, re.MULTILINE), line
    rows = [
        line.split() for line in said.out.splitlines() if re.match(r"  (deq|orig|base w|adapter, )", line)
    ]
    assert [row[0] for row in rows] == ["adapter,", "base", "dequantised,", "original"]
    assert "dequantised is kept" in said.out
    assert refused(cli(run)) == f"{run}/merged exists already; -o names another folder"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--weight", "1", "--weight", "2"), "--weight: 2 given for 1 adapters; give one for each, in order"),
        (("--weight", "nan"), "--weight: nan is not accepted; expected a number other than 0"),
        (
            ("--max-shard-size", "4"),
            "--max-shard-size: '4' is not accepted; expected a size such as 500MB or 4GB",
        ),
        (("--no-measure",), "--no-measure needs --base dequantised or --base original: nothing would choose"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (
            ("--model", "nobody/nothing"),
            "the base model 'nobody/nothing' is not on this machine: --model names",
        ),
        (("--adapter", "nowhere"), "nowhere: no adapter: there is no adapter_config.json"),
        (("--base", "nf4"), "unknown value of --base 'nf4'"),
    ],
)
def test_bad_arguments_are_answered_in_a_line(
    arguments: tuple[str, ...], said: str, cli: Cli, tmp_path: Path
) -> None:
    run = demo_run(tmp_path)
    assert said in refused(cli(run, *arguments))
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "job.json"]


def test_what_cannot_be_merged_is_answered_in_a_line(cli: Cli, tmp_path: Path) -> None:
    assert f"{tmp_path}/none: no such folder, and no such run in" in refused(cli(tmp_path / "none"))
    assert "no adapter: there is no adapter_config.json" in refused(cli(tmp_path))
    full = TrainingJob(
        setup=TrainingSetup(model="demo", max_length=96, method="full"),
        model_source=str(DEMO),
        data_path=str(EVAL),
    )
    place = create_run_folder(tmp_path, full, name="full").path
    assert refused(cli(place)) == (
        f"{place}: nothing to merge: the run trained all weights, {place}/adapter is the model"
    )
    run = demo_run(tmp_path, method="lora")
    assert "this run's base was in 16 bits, so there is one way to merge" in refused(
        cli(run, "--base", "dequantised")
    )
    bare = tmp_path / "bare"
    (run / "adapter").rename(bare)
    for step in (4, 20):
        (run / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (run / "checkpoints" / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    assert refused(cli(run)) == (
        f"{run}: this run has no adapter yet; {run}/checkpoints/checkpoint-20 can be merged"
    )
    assert "give --base dequantised for the one, --base original for the other" in refused(cli(bare))
    assert "give --data FILE, or --no-measure" in refused(cli(bare, "--base", "original"))
    packed = tmp_path / "packed"
    packed.mkdir()
    config = {
        **json.loads((DEMO / "config.json").read_text()),
        "quantization_config": {"quant_method": "gptq"},
    }
    (packed / "config.json").write_text(json.dumps(config))
    said = refused(cli(bare, "--model", packed, "--base", "original", "--no-measure"))
    assert "describes weights quantised by GPTQ: give the model they were made from" in said


def test_too_little_room_is_told_before_anything_is_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = demo_run(tmp_path)
    monkeypatch.setattr(needs, "available_host_bytes", lambda: 2**29)
    assert "of host memory are needed and 0.50 GiB are free; --max-shard-size" in refused(cli(run))
    monkeypatch.setattr(needs, "available_host_bytes", lambda: needs.PROCESS_BYTES + 2**24)
    monkeypatch.setattr(measuring, "MEASURED_EXAMPLES", 400)
    monkeypatch.setattr(measuring, "MEASURED_TOKENS", 10**6)
    many = ("--data", EVAL.with_name("train.jsonl"), "--max-shard-size", "1MB")
    assert "of host memory are needed to measure" in refused(cli(run, *many))
    usage = shutil.disk_usage(tmp_path)._replace(free=6 * 10**6)
    monkeypatch.setattr(needs, "available_host_bytes", lambda: 2**40)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: usage)
    assert "0.01 GiB of disk are needed and 0.01 GiB are free; --base writes one" in refused(cli(run))
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "job.json"]


def test_ranks_are_rounded_up_to_what_vllm_accepts() -> None:
    assert [vllm_rank(rank) for rank in (1, 4, 8, 9, 16, 64, 65, 257, 512, 513)] == [
        *(1, 8, 8, 16, 16, 64, 128, 320, 512),
        None,
    ]


def test_servers_are_not_given_adapters_that_they_refuse_or_misread(folder: Path) -> None:
    base = find_base(str(base_of("llama", folder)), allow_download=False)

    def lines(name: str, **options: Any) -> str:
        adapter = read_adapter(adapter_on(base.path, folder / "served" / name, **options))
        return "\n".join(command for _, command in serving.unmerged_lines(base, adapter))

    assert "serves no DoRA unmerged" in lines("dora", use_dora=True)
    assert "convert_lora_to_gguf.py" not in lines("dora-2", use_dora=True)
    scaled = lines("scaled", use_rslora=True)
    assert "--enable-lora" in scaled
    assert "scales by alpha / rank, which is too little for rsLoRA" in scaled
    assert "one rank and alpha for all modules" in lines("patterned", rank_pattern={"q_proj": 2})


def test_ranks_are_read_from_patterns(folder: Path) -> None:
    adapter = adapter_on(base_of("llama", folder), folder / "ranks", rank_pattern={"q_proj": 24})
    assert read_adapter(adapter).rank == 24
    assert read_adapter(adapter).patterned
