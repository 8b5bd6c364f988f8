"""Data with images, without torch: their sizes from the files' heads, their tokens, their places, and the
plan.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from PIL import Image

from planner.base.data_files import PROFILES
from planner.base.errors import FieldError, InputError, NotModelledError
from planner.data.examples import Conversation, Picture
from planner.data.image_rule import ImageSize
from planner.data.images import image_size
from planner.data.lengths import DatasetStats
from planner.data.reader import estimate_file, read_training_data
from planner.memory import estimate_memory
from planner.models.catalog import load_shipped, resolve_model
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

QWEN, GEMMA = "qwen2.5-vl-7b", "gemma-3-4b-vision"
DRAWN = PROFILES / "demo" / "images" / "shapes.jsonl"
ANSWER = {"role": "assistant", "content": "a cat"}
ASKED = {"role": "user", "content": "what?"}
SHOWN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, size in enumerate(((64, 48), (30, 60)), start=1):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    return tmp_path


def read(folder: Path, *rows: dict[str, Any]) -> tuple[Any, ...]:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return read_training_data(path).examples


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    # Counted by transformers' own processor with a cap of 28 x 28 x 1280 pixels.
    [(224, 224, 64), (448, 448, 256), (640, 480, 391), (1024, 1024, 1225), (1920, 1080, 1222)],
)
def test_tokens_of_qwens_images(width: int, height: int, tokens: int) -> None:
    from dataclasses import replace

    tower = load_shipped(QWEN).tower
    assert tower is not None
    rule = replace(tower.rule, max_pixels=28 * 28 * 1280)
    assert rule.tokens(rule.patches(ImageSize(width, height))) == tokens


def test_every_image_of_gemma_is_256_tokens() -> None:
    tower = load_shipped(GEMMA).tower
    assert tower is not None
    for size in ((9, 900), (896, 896)):
        assert tower.rule.tokens(tower.rule.patches(ImageSize(*size))) == 256


def test_sizes_are_read_from_the_head_alone_and_as_shown(tmp_path: Path) -> None:
    """A file that ends after its head, which could not be decoded; and one that a camera has turned."""
    whole = tmp_path / "whole.png"
    Image.effect_noise((640, 480), 100).save(whole)
    (tmp_path / "head.png").write_bytes(whole.read_bytes()[:200])
    assert image_size(tmp_path / "head.png", "x") == ImageSize(640, 480)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg", "x") == ImageSize(20, 60)
    (tmp_path / "huge.png").write_bytes(png_head(40_000, 40_000))
    with pytest.raises(InputError, match=r"x: .* is no image that is read|has too many pixels"):
        image_size(tmp_path / "huge.png", "x")


def png_head(width: int, height: int) -> bytes:
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_pictures_stand_where_the_row_has_them(folder: Path) -> None:
    first, second = (Picture(str(folder / f"{n}.png"), size) for n, size in ((1, (64, 48)), (2, (30, 60))))
    marked = {"role": "user", "content": "a <image> b <image>?"}
    parts = [{"type": "text", "text": "see"}, {"type": "image", "image": "2.png"}]
    named = {"role": "user", "content": parts}
    for row, expected in (
        ({"messages": [SHOWN, ANSWER], "images": ["1.png"]}, (first, "what?")),
        ({"messages": [SHOWN, ANSWER], "image": {"path": "1.png", "bytes": None}}, (first, "what?")),
        ({"messages": [ASKED, ANSWER], "images": ["1.png", "2.png"]}, (first, second, "what?")),
        ({"messages": [marked, ANSWER], "images": ["1.png", "2.png"]}, ("a ", first, " b ", second, "?")),
        ({"messages": [named, ANSWER]}, ("see", second)),
        ({"prompt": [SHOWN], "completion": [ANSWER], "images": ["1.png"]}, (first, "what?")),
        ({"question": "what?", "answer": "a cat", "image": "1.png"}, (first, "what?")),
    ):
        (example,) = read(folder, row)
        assert isinstance(example, Conversation)
        assert example.messages[0].parts == expected, row
    shown = example.messages[0].to_dict()["content"]
    assert shown == [{"type": "image"}, {"type": "text", "text": "what?"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [SHOWN, ANSWER]}, "content must be text, or images that the row names"),
        ({"messages": [SHOWN, ANSWER], "images": ["1.png", "2.png"]}, "2 images, but places for 1"),
        ({"messages": [SHOWN, SHOWN, ANSWER], "images": ["1.png"]}, "show more images than it has"),
        ({"messages": [SHOWN, ANSWER], "images": ["gone.png"]}, "there is no image"),
        ({"messages": [SHOWN, ANSWER], "images": ["data.jsonl"]}, "is no image that is read"),
        ({"messages": [SHOWN, ANSWER], "images": ["https://a.b/c.png"]}, "is no file of this machine"),
        ({"messages": [SHOWN, ANSWER], "images": [{"bytes": "iVBO"}]}, "held as bytes"),
        ({"messages": [SHOWN, ANSWER], "images": ["1.png"], "image": "2.png"}, "both image and images"),
        ({"messages": [ASKED, {**SHOWN, "role": "assistant"}], "image": "1.png"}, "message 2: an assistant"),
        ({"text": "a cat", "images": ["1.png"]}, "images are shown in turns"),
        ({"prompt": "a", "completion": "b", "images": ["1.png"]}, "images are shown in turns"),
        ({"messages": [ASKED, ANSWER], "videos": ["1.mp4"]}, "videos and sound are not trained"),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_named(folder: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"line 1: .*") as caught:
        read(folder, row)
    assert said in str(caught.value)


def test_lengths_have_the_images_tokens_in_them() -> None:
    bare, seen = estimate_file(DRAWN), estimate_file(DRAWN, load_shipped(GEMMA).tower.rule)  # type: ignore[union-attr]
    assert (bare.images, bare.image_patches) == (24, 0)
    assert (seen.image_patches, seen.total_patches) == (4096, 24 * 4096)
    assert seen.longest == bare.longest + 256 + 4
    assert DatasetStats.from_dict(json.loads(json.dumps(seen.to_dict()))) == seen
    assert (
        "images"
        not in DatasetStats.from_lengths(
            [3], loss_tokens=1, loss_on="all", data_format="text", estimated=True
        ).to_dict()
    )


def test_a_plan_for_data_with_images_is_of_the_whole_model() -> None:
    plan = make_plan(make_request("gemma-3-4b", gpu="24GB", data=str(DRAWN)), whole=False)
    assert (plan.model.id, plan.request.model, plan.setup.model) == (GEMMA, GEMMA, GEMMA)
    assert plan.setup.image_patches == 4096
    assert (plan.setup.packing, plan.setup.compile) == (False, "none")
    with pytest.raises(InputError, match=r"llama-3.1-8b is a model of text: images are trained with"):
        make_plan(make_request("llama-3.1-8b", gpu="24GB", data=str(DRAWN)), whole=False)


def test_memory_grows_with_patches_and_shrinks_with_a_tower_in_4_bits() -> None:
    model = resolve_model(QWEN)
    assert model.parameter_count == 8_292_166_656

    def bytes_of(**knobs: Any) -> int:
        setup = TrainingSetup(model=QWEN, max_length=1024, per_device_train_batch_size=2, **knobs)
        runs = TrainingRun(setup=setup, model=model)
        fitted, replayed = (estimate_memory(runs, replay=replay) for replay in (False, True))
        assert fitted.allocated_bytes == pytest.approx(replayed.allocated_bytes, rel=0.001)
        return replayed.allocated_bytes

    plain, seeing = bytes_of(), bytes_of(image_patches=2048)
    assert plain < seeing < bytes_of(image_patches=4096)
    # Half of two bytes a weight less the constants.
    saved = seeing - bytes_of(image_patches=2048, vision_tower="4bit")
    assert saved == pytest.approx(model.tower.linear_weights * 1.484, rel=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "knobs", "error"),
    [
        ("llama-3.1-8b", {"image_patches": 16}, FieldError),
        ("llama-3.1-8b", {"vision_tower": "4bit"}, FieldError),
        (QWEN, {"method": "full"}, InputError),
        (QWEN, {"image_patches": 16, "packing": True}, NotModelledError),
        (QWEN, {"image_patches": 16, "compile": "regional"}, NotModelledError),
        (QWEN, {"attn_implementation": "eager"}, NotModelledError),
        (QWEN, {"num_processes": 2, "distributed": "ddp"}, NotModelledError),
    ],
    ids=str,
)
def test_what_is_not_counted_beside_a_tower_is_refused(
    model: str, knobs: dict[str, Any], error: type[Exception]
) -> None:
    setup = TrainingSetup(model=model, max_length=512, **knobs)
    with pytest.raises(error):
        estimate_memory(TrainingRun(setup=setup, model=resolve_model(model)))
