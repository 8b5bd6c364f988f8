"""Vision-language models: images as their own processors see them, trained with the tower frozen, in the
bytes that were planned.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("PIL")

import torch
from peft import PeftModel
from PIL import Image

from launcher.demo import drawn_images
from launcher.models.inspect import inspect_config
from launcher.models.vision_families import FAMILIES
from launcher.runs.training_job import TrainingJob
from launcher.training import build, dataset
from launcher.training.callbacks import decoder_layers
from launcher.training.images.batches import _opened
from launcher.training.images.tokens import ImageTokens, image_tokens, processor_of
from planner.base.data_files import PROFILES
from planner.base.errors import InputError
from planner.data.image_rule import ImageSize
from planner.memory.decoder.live_bytes import at
from planner.memory.estimate import live_memory
from planner.memory.measured.files import coefficients_for
from planner.memory.step import images as step_images
from planner.memory.step.resident import INPUT_BYTES_PER_TOKEN
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.models.vision_config import as_processed
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

from . import small_vision
from .like_cuda import like_cuda
from .live_bytes import LiveBytes, tensors_of
from .test_live_bytes import POSITION_IDS_BYTES, largest

pytestmark = pytest.mark.slow

DRAWN = PROFILES / "demo" / "images"
SIZES = [
    (1, 1),
    (28, 28),
    (57, 300),
    (224, 224),
    (640, 480),
    (1000, 5),
    (1024, 1024),
    (1920, 1080),
    (5000, 40),
]


@pytest.fixture(scope="module", params=sorted(small_vision.CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_vision.save(family, tmp_path_factory.mktemp(family))


def test_patches_and_tokens_are_those_of_the_processor(family: str, folder: Path) -> None:
    """Of images of all proportions, with what a preprocessor_config.json says of pixels."""
    values = small_vision.PROCESSORS[family]
    processor, rule = processor_of(family, values), images_of(folder).rule
    for width, height in SIZES:
        made = processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
        rows, columns = rule.grid(ImageSize(width, height))
        pixels = made["pixel_values"].numel()
        if "image_grid_thw" in made:
            assert made["image_grid_thw"].tolist() == [[1, rows, columns]], (width, height)
        assert pixels == rows * columns * spec_of(folder).tower.patch_floats
    if rule.resize == "fitted":
        with pytest.raises(InputError, match="1001 x 5"):
            rule.grid(ImageSize(1001, 5))
        published = as_processed(rule, {"min_pixels": 3136, "max_pixels": 12845056})
        assert published.patches(ImageSize(3840, 2160)) == 154 * 274


def test_a_chat_has_the_tokens_that_the_processor_makes_of_it(family: str, folder: Path) -> None:
    data = dataset.read_dataset(DRAWN / drawn_images.QUESTIONS)
    tokenizer = build.load_tokenizer(str(folder), allow_download=False)
    made = list(dataset.tokenised(data, tokenizer, images=images_of(folder)))
    for example, tokens in list(zip(data.examples, made, strict=True))[::5]:
        text = tokenizer.apply_chat_template([one.to_dict() for one in example.messages], tokenize=False)
        processor = processor_of(family, small_vision.PROCESSORS[family])
        features = processor(images=[_opened(path) for path in tokens.files], return_tensors="pt")
        assert tokens.input_ids == tokenizer(written_by(family, text, features, tokenizer))["input_ids"]
        learned = [one for one, label in zip(tokens.input_ids, tokens.labels, strict=True) if label >= 0]
        assert images_of(folder).token_id not in learned
        assert tokens.files == (str(DRAWN / Path(tokens.files[0]).name),)


def written_by(family: str, text: str, features: Any, tokenizer: Any) -> str:
    """A chat's text as transformers' own processor class replaces its images."""
    from transformers import Gemma3Processor, Qwen2_5_VLProcessor

    if family == "gemma3":
        tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token = small_vision.GEMMA_TOKENS
        tokenizer.boi_token_id = tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
        own = Gemma3Processor.__new__(Gemma3Processor)
        tokens = "".join([tokenizer.image_token] * small_vision.PROCESSORS[family]["image_seq_length"])
        own.full_image_sequence = f"\n\n{tokenizer.boi_token}{tokens}{tokenizer.eoi_token}\n\n"
        return text.replace(tokenizer.boi_token, own.replace_image_token(features, 0))
    own = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    own.image_token = "<|image_pad|>"
    own.image_processor = processor_of(family, small_vision.PROCESSORS[family])
    for index in range(len(features["image_grid_thw"])):
        text = text.replace(own.image_token, f"\0{index}", 1)
    for index in range(len(features["image_grid_thw"])):
        text = text.replace(f"\0{index}", own.replace_image_token(features, index))
    return text


@lru_cache(maxsize=4)
def spec_of(folder: Path) -> ModelSpec:
    return resolve_model(str(folder), images=True, inspector=inspect_config)


@lru_cache(maxsize=4)
def images_of(folder: Path) -> ImageTokens:
    tokenizer = build.load_tokenizer(str(folder), allow_download=False)
    return image_tokens(str(folder), tokenizer, allow_download=False)


@dataclass(frozen=True, kw_only=True)
class Trained:
    setup: TrainingSetup
    trainer: Any
    losses: list[float]


def train(folder: Path, out: Path, *, steps: int, count: int = 24, **knobs: Any) -> Trained:
    """A run on the drawn images, by what the launcher builds."""
    tokenizer = build.load_tokenizer(str(folder), allow_download=False)
    data = dataset.read_dataset(DRAWN / drawn_images.QUESTIONS)
    images = images_of(folder)
    stats = dataset.measure_stats(data, tokenizer, images=images)
    setup = TrainingSetup(
        model=str(folder),
        max_length=stats.longest,
        dtype="float32",
        per_device_train_batch_size=2,
        image_patches=stats.image_patches,
        optim="adamw_torch_fused",
        **knobs,
    )
    rows = dataset.to_trl_dataset(data, tokenizer, max_length=stats.longest, images=images)
    job = TrainingJob(
        setup=setup, model_source=str(folder), data_path="drawn", max_steps=steps, learning_rate=1e-2
    )
    trainer = build.build_trainer(
        setup,
        job,
        model=build.load_model(setup, str(folder), device=torch.device("cpu"), allow_download=False),
        tokenizer=tokenizer,
        train_dataset=rows.select(range(24 - count, 24)),
        eval_dataset=None,
        output_dir=out,
        on_gpu=False,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(setup=setup, trainer=trainer, losses=losses)


def test_a_small_one_learns_with_its_tower_frozen_and_as_it_was(
    family: str, folder: Path, tmp_path: Path
) -> None:
    """QLoRA: the loss falls, adapters are on the language model alone, the tower's layers stay as loaded and
    compute no gradients; the saved adapter answers as the trained one does, and its bytes are as planned.
    """
    run = train(folder, tmp_path / "out", steps=10, method="qlora")
    model, path = run.trainer.model, FAMILIES[family].paths[0]
    assert sum(run.losses[-3:]) / 3 < 0.93 * run.losses[0]
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == (
        TrainingRun(setup=run.setup, model=spec_of(folder)).trained.elements
    )
    tower = model.get_base_model().get_submodule(path)
    assert {type(module) for module in tower.modules() if isinstance(module, torch.nn.Linear)} == {
        torch.nn.Linear
    }
    assert len(decoder_layers(model)) == small_vision.TEXT["num_hidden_layers"]

    run.trainer.save_model(str(tmp_path / "saved"))
    base = build.load_model(run.setup, str(folder), device=torch.device("cpu"), allow_download=False)
    again = PeftModel.from_pretrained(base, tmp_path / "saved").train()
    batch = run.trainer.data_collator([run.trainer.train_dataset[index] for index in (20, 21)])
    labels = batch.pop("labels")
    with torch.no_grad():
        assert labels.shape == batch["input_ids"].shape
        first, second = (one(**batch).logits for one in (model.train(), again))
        with again.disable_adapter():
            without = again(**batch).logits
    # PEFT reads into float32 what TRL has trained in bfloat16.
    assert torch.allclose(first, second, atol=0.03)
    assert not torch.allclose(first, without, atol=0.3)
    assert_as_planned(replace(run), folder, batch)


@pytest.mark.parametrize(
    "knobs",
    [{"method": "lora", "gradient_checkpointing": False}, {"method": "qlora", "vision_tower": "4bit"}],
    ids=str,
)
def test_other_ways_to_hold_it(folder: Path, tmp_path: Path, knobs: dict[str, Any]) -> None:
    run = train(folder, tmp_path / "out", steps=1, count=2, **knobs)
    model = run.trainer.model
    packed = [name for name, one in model.named_modules() if type(one).__name__ == "Linear4bit"]
    towers = [name for name in packed if "language_model" not in name]
    assert bool(towers) == (run.setup.vision_tower == "4bit")
    if run.setup.method == "lora":
        batch = run.trainer.data_collator(list(run.trainer.train_dataset))
        batch.pop("labels")
        assert_as_planned(run, folder, batch)


def assert_as_planned(run: Trained, folder: Path, batch: dict[str, Any]) -> None:
    """Live bytes while images become embeddings, and of both passes of the language model, within 1.5%."""
    rule, length = images_of(folder).rule, batch["input_ids"].shape[1]
    files = run.trainer.train_dataset[-2:]["image_files"]
    patches = max(rule.patches(ImageSize(*Image.open(path).size)) for row in files for path in row)
    spec = spec_of(folder)
    setup = run.setup.replace(max_length=length, image_patches=patches)
    planned = TrainingRun(setup=setup, model=spec, padded=not bool(batch["attention_mask"].all()))
    with like_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_images, "SCATTER_WIDTH", 0)
        step_images._live.cache_clear()
        live = live_memory(
            planned, gpu=None, coefficients=coefficients_for(None, EXPANDABLE), allocator=EXPANDABLE
        )
        entered, before, forward, saved, backward = measured(run.trainer.model, batch)
    timeline, hidden = live.timeline, planned.micro_step.tokens * spec.hidden_size * 4
    step_images._live.cache_clear()
    tables = live.resident.tables_bytes - INPUT_BYTES_PER_TOKEN * planned.micro_step.tokens
    tables -= step_images.input_bytes(planned)
    raw = hidden * (2 if planned.keeps_raw_embedding else 1)
    kept = timeline._kept_below(spec.num_hidden_layers) + at(
        timeline.final_norm.saved, timeline.shape.tokens, timeline.shape.scores
    )
    masks = planned.micro_step.scores * len(planned.mask_windows) if spec.tower and spec.tower.masked else 0
    for found, expected in (
        (timeline.images.held_bytes + raw + masks, entered),
        (timeline.images.peak_bytes, before),
        (kept + tables, saved),
        (largest(timeline, "forward of") + tables, forward),
        (largest(timeline, "backward of") + tables, backward),
    ):
        assert found == pytest.approx(expected, rel=0.015, abs=2 * POSITION_IDS_BYTES + length * 32)


def measured(model: Any, batch: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Live bytes when the language model begins, their peak before that, the peak of forward, what it has
    saved, and the peak of backward.
    """
    base = model.train().get_base_model().model
    language = base.language_model
    run, marks = language.forward, []
    gc.collect()
    with LiveBytes([*tensors_of(model), *batch.values()]) as live:

        def forward(*args: Any, **kwargs: Any) -> Any:
            marks.append((live.live_bytes, live.peak_bytes))
            return run(*args, **kwargs)

        language.forward = forward
        try:
            states = base(**batch, use_cache=False).last_hidden_state
        finally:
            language.forward = run
        own, peak = states.untyped_storage().nbytes(), live.peak_bytes
        saved = live.live_bytes - own
        gradient = torch.empty_like(states)
        live.reset_peak()
        states.backward(gradient)
        return *marks[0], peak, saved, live.peak_bytes - 2 * own


def test_without_images_a_language_model_is_loaded_alone(tmp_path: Path) -> None:
    """transformers builds Gemma 3 of 4B and up whole, as a causal language model: its tower is let go of, and
    what is left is what is planned without images.
    """
    folder = small_vision.save("gemma3", tmp_path)
    setup = TrainingSetup(model=str(folder), max_length=64, dtype="float32", optim="adamw_torch_fused")
    model = build.load_model(setup, str(folder), device=torch.device("cpu"), allow_download=False)
    spec = resolve_model(str(folder), inspector=inspect_config)
    left = [
        name for name, _ in model.named_parameters() if "language_model" not in name and "lm_head" not in name
    ]
    assert (left, spec.tower) == ([], None)
    adapted = build.lora_config(setup, model)
    assert adapted is not None
    found = PeftModel(model, adapted)
    elements = sum(one.numel() for one in found.parameters() if one.requires_grad)
    assert elements == TrainingRun(setup=setup, model=spec).trained.elements


def test_what_cannot_be_shown_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """A template that leaves images out, an image that is gone, a folder of a model of text."""
    tokenizer = build.load_tokenizer(str(folder), allow_download=False)
    data = dataset.read_dataset(DRAWN / drawn_images.QUESTIONS)
    with pytest.raises(InputError, match="has images, and the model is one of text"):
        list(dataset.tokenised(data, tokenizer))
    tokenizer.chat_template = small_vision.template("gemma3").replace("<start_of_image>", "")
    with pytest.raises(InputError, match=r"example 1: .* shows 0 of \d+ tokens of images"):
        list(dataset.tokenised(data, tokenizer, images=images_of(folder)))
    with pytest.raises(InputError, match="cannot be read any more"):
        _opened(str(tmp_path / "gone.png"))
    with pytest.raises(InputError, match="images are trained with"):
        resolve_model(str(PROFILES / "demo" / "model"), images=True)
