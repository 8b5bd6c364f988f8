"""Draw the demo's images: `python -m launcher.demo.drawn_images profiles/demo/images`.

A dozen pictures of circles, squares and triangles in plain colours, of several sizes and proportions, and a
file of questions about them with answers. The same call draws the same pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.base.errors import InputError

COLOURS = {
    "red": (204, 51, 51),
    "blue": (51, 85, 204),
    "green": (46, 139, 87),
    "yellow": (230, 190, 40),
    "black": (30, 30, 30),
}
BACKGROUND = (246, 244, 238)
QUESTIONS = "shapes.jsonl"
_NUMBERS = ("no", "one", "two", "three")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture: its size in pixels, and its shapes from left to right, each a colour and a form."""

    name: str
    size: tuple[int, int]
    shapes: tuple[tuple[str, str], ...]


DRAWINGS = (
    Drawing(name="01", size=(224, 224), shapes=(("red", "circle"),)),
    Drawing(name="02", size=(224, 224), shapes=(("blue", "square"),)),
    Drawing(name="03", size=(252, 196), shapes=(("green", "triangle"),)),
    Drawing(name="04", size=(196, 252), shapes=(("yellow", "circle"),)),
    Drawing(name="05", size=(336, 224), shapes=(("red", "square"), ("blue", "circle"))),
    Drawing(name="06", size=(336, 224), shapes=(("green", "circle"), ("black", "triangle"))),
    Drawing(name="07", size=(320, 240), shapes=(("yellow", "square"), ("red", "triangle"))),
    Drawing(name="08", size=(300, 200), shapes=(("black", "circle"), ("green", "square"))),
    Drawing(
        name="09", size=(448, 224), shapes=(("red", "circle"), ("green", "square"), ("blue", "triangle"))
    ),
    Drawing(
        name="10", size=(448, 224), shapes=(("blue", "circle"), ("yellow", "triangle"), ("black", "square"))
    ),
    Drawing(
        name="11", size=(480, 270), shapes=(("green", "triangle"), ("red", "square"), ("yellow", "circle"))
    ),
    Drawing(
        name="12", size=(480, 270), shapes=(("black", "square"), ("blue", "square"), ("green", "circle"))
    ),
)


def draw(drawing: Drawing) -> Any:
    """The picture, in a palette of as few colours as it has."""
    from PIL import Image, ImageDraw

    width, height = drawing.size
    image = Image.new("RGB", drawing.size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    column = width / len(drawing.shapes)
    radius = 0.36 * min(column, height)
    for place, (colour, form) in enumerate(drawing.shapes):
        x, y = column * (place + 0.5), height / 2
        box = (x - radius, y - radius, x + radius, y + radius)
        if form == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif form == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon(
                ((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), COLOURS[colour]
            )
    return image.quantize(8)


def questions(drawing: Drawing) -> Iterator[dict[str, Any]]:
    """Two conversations about a picture: what it shows, and how many shapes or what stands first."""
    named = [f"a {colour} {form}" for colour, form in drawing.shapes]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    yield _row(drawing, "What does this picture show?", f"It shows {listed}.")
    if len(named) == 1:
        colour, form = drawing.shapes[0]
        yield _row(drawing, f"Which colour is the {form}?", f"The {form} is {colour}.")
        return
    told = f"There are {_NUMBERS[len(named)]} shapes, and the one on the left is {named[0]}."
    yield _row(drawing, "How many shapes are there, and which is on the left?", told)


def _row(drawing: Drawing, asked: str, answer: str) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": asked}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [f"{drawing.name}.png"],
    }


def write(folder: Path) -> None:
    """Write pictures and questions into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for drawing in DRAWINGS:
        draw(drawing).save(folder / f"{drawing.name}.png", optimize=True)
        rows += [json.dumps(row) for row in questions(drawing)]
    (folder / QUESTIONS).write_text("\n".join(rows) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Write into the folder named.

    Raises:
        InputError: none is.
    """
    if len(arguments) != 1:
        raise InputError("name the folder to draw into")
    write(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
