"""Pictures of examples: which file each is, where it stands among the turns' texts, and its size.

A picture is a file of this machine, named from the folder of the data. Its size is read from the file's head;
what it shows is read while the model is trained (launcher/training/images/batches.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.base.errors import InputError, MissingExtraError, shorten
from planner.data.examples import Conversation, Message, Picture
from planner.data.image_rule import ImageSize

IMAGE_KEYS = ("images", "image")
MARKER = "<image>"
"""Where LLaMA-Factory's data have a picture in a turn's text."""
UNPLACED = Picture("", ImageSize(0, 0))
"""A part that says that there is a picture, which the row's images name."""
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""Exif's orientations in which width and height are exchanged (CIPA DC-008, tag 274)."""
_MAX_SIDE = 2**16


def part_of_image(part: Mapping[str, Any], where: str) -> Picture:
    """The picture of a content part of type image or image_url.

    Raises:
        InputError: it names its file in a way that is not read.
    """
    named = part.get("image", part.get("path", part.get("url", part.get("image_url"))))
    if isinstance(named, Mapping) and "url" in named:
        named = named["url"]
    if named is None:
        return UNPLACED
    return Picture(_file_of(named, where), ImageSize(0, 0))


def with_pictures(example: Conversation, row: Mapping[str, Any], folder: Path, where: str) -> Conversation:
    """A conversation whose pictures are those of its row, each with its size.

    Parts of type image take the row's images one after the other, and so do markers in the text; where there
    is neither, they come before the first text of the user, as TRL has them (trl/data_utils.py,
    prepare_multimodal_messages).

    Raises:
        InputError: the row has fewer or more images than places for them, one is not there or is no image, or
            an assistant shows one.
    """
    names = _named(row, where)
    if not names and not any(message.parts for message in example.messages):
        return example
    if not names:
        nowhere = any(part is UNPLACED for message in example.messages for part in message.parts)
        if nowhere:
            raise InputError(f"{where}: content must be text, or images that the row names in its key images")
    messages = _placed(example.messages, len(names), where)
    waiting = iter(names)
    found = tuple(_filled(message, waiting, folder, where) for message in messages)
    left = len(list(waiting))
    if left:
        raise InputError(
            f"{where}: {len(names)} images, but places for {len(names) - left} of them in its turns"
        )
    for number, message in enumerate(found, start=1):
        if message.role == "assistant" and message.parts:
            raise InputError(
                f"{where}: message {number}: an assistant shows no images, it learns to speak of them"
            )
    return replace(example, messages=found)


def image_size(path: Path, where: str) -> ImageSize:
    """The size of an image file as it is shown, from its head.

    Raises:
        InputError: it is not there, or is no image that is read.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("images", "the package pillow") from error

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                # Of a PNG without the tag Pillow would decode all of it to look for one.
                tagged = image.format != "PNG" or "exif" in image.info
                turned = tagged and image.getexif().get(_ORIENTATION) in _TURNED
    except FileNotFoundError as error:
        raise InputError(f"{where}: there is no image {shorten(str(path))}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{where}: {shorten(str(path))} is no image that is read: {shorten(str(error))}"
        ) from error
    except Image.DecompressionBombWarning as error:
        raise InputError(
            f"{where}: {shorten(str(path))} has too many pixels: {shorten(str(error))}"
        ) from error
    if not 0 < max(width, height) <= _MAX_SIDE or not min(width, height):
        raise InputError(f"{where}: {shorten(str(path))} has {width} x {height} pixels")
    return ImageSize(height, width) if turned else ImageSize(width, height)


def _named(row: Mapping[str, Any], where: str) -> list[str]:
    """The files that a row names."""
    given = [row[key] for key in IMAGE_KEYS if row.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise InputError(f"{where}: has both image and images; keep one")
    if not given:
        return []
    images = given[0] if isinstance(given[0], list) else [given[0]]
    return [_file_of(image, where) for image in images]


def _file_of(image: object, where: str) -> str:
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            raise InputError(f"{where}: images held as bytes in the data are not read: write each to a file")
        image = image.get("path")
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: an image must be the name of a file, found {shorten(image)}")
    if "://" in image[:10] or image.startswith("data:"):
        raise InputError(
            f"{where}: {shorten(image)} is no file of this machine: fetch it first, and name the file"
        )
    return image


def _placed(messages: tuple[Message, ...], count: int, where: str) -> tuple[Message, ...]:
    """Turns with a part for each of so many images of the row, where they have none."""
    if any(message.parts for message in messages) or not count:
        return messages
    if any(MARKER in message.content for message in messages):
        return tuple(_at_markers(message) for message in messages)
    first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise InputError(f"{where}: has images, but no turn of a user to show them in")
    parts: tuple[str | Picture, ...] = (*[UNPLACED] * count, messages[first].content)
    return (*messages[:first], replace(messages[first], parts=parts), *messages[first + 1 :])


def _at_markers(message: Message) -> Message:
    texts = message.content.split(MARKER)
    if len(texts) == 1:
        return message
    parts: list[str | Picture] = []
    for number, text in enumerate(texts):
        parts += [UNPLACED] * bool(number) + [text] * bool(text)
    return replace(message, content="".join(texts), parts=tuple(parts))


def _filled(message: Message, names: Iterator[str], folder: Path, where: str) -> Message:
    if not message.parts:
        return message
    parts: list[str | Picture] = []
    for part in message.parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        name = part.path or next(names, None)
        if name is None:
            raise InputError(f"{where}: its turns show more images than it has")
        path = folder / name
        parts.append(Picture(str(path), image_size(path, where)))
    return replace(message, parts=tuple(parts))
