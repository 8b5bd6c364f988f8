"""Reading a claim as people write it: "Qwen2.5-14B 4k QLoRA: 11.8 GB, 2,600 tok/s on a 5060 Ti".

Each part is taken out of the text by the first pattern that finds it, so that no number is read twice. What
has digits and is left over is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from planner.base.errors import FieldError, InputError, shorten
from planner.claims.claim import MEMORY, SPEED, TIME, WEIGHTS, Claim, Figure
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import catalog_id
from planner.setup.knob import KnobValue

MAX_TEXT = 2000
_MOST_WORDS = 5
"""Words of a name: "RTX 5060 Ti 16GB" has four."""
GIB, KIB = 2**30, 1024
_NUMBER = r"(\d[\d,]*(?:\.\d+)?)\s*([kK])?"
_RANGE = rf"{_NUMBER}(?:\s*(?:-|\u2013|to)\s*{_NUMBER})?"
_BYTES = r"(GiB|GB|MiB|MB|TB)\b"
_FIGURES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (SPEED, re.compile(rf"{_RANGE}\s*(tok(?:en)?s?\s*(?:/|per|a)\s*s(?:ec(?:ond)?)?\b|t/s\b|tps\b)", re.I)),
    (TIME, re.compile(rf"{_RANGE}\s*(h|hrs?|hours?|min|mins|minutes|days?)\b", re.I)),
    (
        WEIGHTS,
        re.compile(rf"\b(?:base|weights)\b(?:\s+(?:is|are|of|at|takes?))?[\s:=~]*{_RANGE}\s*{_BYTES}", re.I),
    ),
    (WEIGHTS, re.compile(rf"{_RANGE}\s*{_BYTES}\s*(?:of\s+)?(?:base|weights)\b", re.I)),
    (MEMORY, re.compile(rf"{_RANGE}\s*{_BYTES}", re.I)),
)
_UNITS = {"gib": GIB, "gb": GIB, "mib": 2**20, "mb": 2**20, "tb": 2**40}
_SCALES: dict[str, Callable[[str], float]] = {
    SPEED: lambda _: 1.0,
    TIME: lambda unit: {"h": 1.0, "m": 1 / 60, "d": 24.0}[unit[0].lower()],
    WEIGHTS: lambda unit: float(_UNITS[unit.lower()]),
    MEMORY: lambda unit: float(_UNITS[unit.lower()]),
}
"""GB is read as GiB, which is what drivers show and what favours the claim."""
_BATCH = re.compile(
    r"\b(?:micro-?)?(?:batch(?:\s*size)?|bs)\s*(?:of|=|:)?\s*(\d+)\b|\b(\d+)\s*per device\b", re.I
)
_RANK = re.compile(r"\b(?:rank|lora_r|r)\s*(?:of|=|:)?\s*(\d+)\b", re.I)
_EPOCHS = re.compile(r"\b(\d+(?:\.\d+)?)\s*epochs?\b", re.I)
_EXAMPLES = re.compile(
    rf"\b{_NUMBER}\s*(?:[a-z&]+\s+){{0,2}}(?:examples|samples|rows|pairs|conversations)\b", re.I
)
_LENGTH = re.compile(
    rf"\b(?:at|of|x|max_length|seq(?:uence)?(?:[ _]len(?:gth)?)?|length|context)?\s*[=:]?\s*{_NUMBER}"
    r"\s*(?:-?\s*(?:tokens?|context|ctx|seq\w*|long)\b)",
    re.I,
)
_BARE_LENGTH = re.compile(
    r"\b(\d{1,3})([kK])\b|\b(?:at|max_length|length|context|seq(?:uence)?_?len(?:gth)?)\s*[=:]?\s*(\d[\d,]*)\b",
    re.I,
)
_METHODS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("qlora", re.compile(r"\bqlora\b", re.I)),
    ("full", re.compile(r"\bfull(?:[\s-]*(?:parameter|fine-?\s?tun\w+|ft))?\b", re.I)),
    ("lora", re.compile(r"\b(?:lora|dora)\b", re.I)),
    ("qlora", re.compile(r"\b(?:nf4|4-?bit)\b", re.I)),
)
_CARD_SIZE = re.compile(r"\b(?:(\d+)\s*[x\u00d7]\s*)?(\d+)\s*-?\s*G(?:i?B)?\s*(?:card|gpu|vram)s?\b", re.I)
_TIMES = re.compile(rf"\b{_NUMBER}\s*[x\u00d7]\s*{_NUMBER}\s*tokens?\b", re.I)
"""So many examples of so many tokens."""
_SECONDS = ("s", "sec", "second")
_WORD = re.compile(r"[^\s,;()]+")


class _Text:
    """A text out of which what was understood is taken."""

    def __init__(self, text: str) -> None:
        self.left = text

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The first match, blanked out."""
        found = pattern.search(self.left)
        if found is not None:
            self.blank(*found.span())
        return found

    def blank(self, start: int, end: int) -> None:
        self.left = self.left[:start] + ";" * (end - start) + self.left[end:]


def read_claim(
    text: str,
    *,
    knobs: Mapping[str, KnobValue] | None = None,
    model: str | None = None,
    gpu: str | None = None,
) -> Claim:
    """Read a claim; `knobs`, `model` and `gpu` are what is known beside the text, and win over it.

    Raises:
        InputError: it names no model or no method, or states nothing that can be judged.
    """
    if not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
        raise FieldError("claim", text, f"one printable line of at most {MAX_TEXT:,} characters")
    rest = _Text(text)
    named = _take_name(rest, _model_of)
    card = _take_card(rest)
    figures = _take_figures(rest)
    stated = _take_knobs(rest)
    epochs, both = rest.take(_EPOCHS), rest.take(_TIMES)
    examples = both or rest.take(_EXAMPLES)
    if both is not None:
        stated["max_length"] = _tokens_of(both[3], both[4])
    elif (length := rest.take(_LENGTH)) is not None:
        stated["max_length"] = _tokens_of(length[1], length[2])
    elif (bare := rest.take(_BARE_LENGTH)) is not None:
        stated["max_length"] = _tokens_of(bare[1] or bare[3], bare[2])
    stated |= dict(knobs or {})
    model = model or named
    if model is None:
        raise InputError(
            f"no model of the catalog is named in {shorten(text)} (a name, a Hub id, or --model)"
        )
    if "method" not in stated:
        raise InputError(f"no method is named in {shorten(text)} (QLoRA, LoRA or full, or --method)")
    return Claim(
        text=text,
        model=model,
        gpu=gpu or card,
        knobs=tuple(stated.items()),
        figures=figures,
        tokens=_tokens(epochs, examples, stated.get("max_length")),
        unread=tuple(word for word in _WORD.findall(rest.left) if any(c.isdigit() for c in word)),
    )


def _take_name(rest: _Text, known: Callable[[str], str | None]) -> str | None:
    """The name with most words that is known, blanked out."""
    words = [(found.start(), found.end()) for found in re.finditer(r"[^\s,;:()]+", rest.left)]
    for size in range(min(_MOST_WORDS, len(words)), 0, -1):
        for at in range(len(words) - size + 1):
            start, end = words[at][0], words[at + size - 1][1]
            # Between the words of a name there are blanks alone.
            if re.search(r"[,;:()]", rest.left[start:end]):
                continue
            found = known(rest.left[start:end])
            if found is not None:
                rest.blank(start, end)
                return found
    return None


def _model_of(words: str) -> str | None:
    """The catalog's id, or a Hub id as it is: a name with one slash that is no rate."""
    hub = re.fullmatch(r"[a-z][\w.-]*/([\w.-]+)", words, re.I)
    found = catalog_id(words)
    return words if found is None and hub is not None and hub[1].lower() not in _SECONDS else found


def _take_card(rest: _Text) -> str | None:
    """The card, with how many there are; of those that go by a name the one with most memory."""
    sized = rest.take(_CARD_SIZE)
    if sized is not None:
        return f"{sized[1]}x{sized[2]}GB" if sized[1] else f"{sized[2]}GB"
    return _take_name(rest, _card_of)


def _card_of(words: str) -> str | None:
    counted = re.match(r"(\d{1,3})\s*[x\u00d7]\s*(.+)", words)
    count, name = (counted[1] + "x", counted[2]) if counted else ("", words)
    # A bare number of two digits is no card, whatever the catalog calls one.
    if not re.search(r"[a-z]|\d{4}", name, re.I):
        return None
    found = gpu_catalog().named(name)
    return count + max(found, key=lambda gpu: gpu.memory_bytes).id if found else None


def _take_figures(rest: _Text) -> tuple[Figure, ...]:
    found = []
    for kind, pattern in _FIGURES:
        while (match := rest.take(pattern)) is not None:
            first, first_k, last, last_k, unit = match.groups()
            scale = _SCALES[kind](unit)
            # "1-3k" means thousands on both sides.
            low, high = _ends(first, first_k or last_k), _ends(last or first, last_k if last else first_k)
            figure = Figure(
                kind=kind,
                written=" ".join(match[0].split()).strip(":=~ "),
                low=max(0.0, low[0] * scale),
                high=high[1] * scale,
            )
            found.append(figure)
    return tuple(found)


def _ends(digits: str, thousands: str | None) -> tuple[float, float]:
    """A number less and plus half a unit of its last digit."""
    plain = digits.replace(",", "")
    half = 0.5 * 10.0 ** -len(plain.partition(".")[2])
    scale = 1000.0 if thousands else 1.0
    return (float(plain) - half) * scale, (float(plain) + half) * scale


def _take_knobs(rest: _Text) -> dict[str, KnobValue]:
    stated: dict[str, KnobValue] = {}
    if re.search(r"\bdora\b", rest.left, re.I):
        stated["use_dora"] = True
    for method, pattern in _METHODS:
        if rest.take(pattern) is not None and "method" not in stated:
            stated["method"] = method
    batch, rank = rest.take(_BATCH), rest.take(_RANK)
    if batch is not None:
        stated["per_device_train_batch_size"] = int(batch[1] or batch[2])
    if rank is not None:
        stated["lora_r"] = int(rank[1])
    return stated


def _tokens_of(digits: str, thousands: str | None) -> int:
    """A length; 4k is 4,096."""
    return round(float(digits.replace(",", "")) * (KIB if thousands else 1))


def _tokens(
    epochs: re.Match[str] | None, examples: re.Match[str] | None, length: KnobValue | None
) -> float | None:
    """Tokens of all epochs (one where none are stated), each example as long as stated; null where examples
    or their length are not.
    """
    if examples is None or not isinstance(length, int):
        return None
    count = float(examples[1].replace(",", "")) * (1000 if examples[2] else 1)
    return count * length * (float(epochs[1]) if epochs is not None else 1.0)
