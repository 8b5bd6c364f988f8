"""Bytes, durations and foreign text as the screens show them."""

from __future__ import annotations

import math

GIB = 2**30
FITS, TIGHT, TOO_BIG = "✔ fits", "! tight", "✘ too big"
"""Verdicts on one line: a sign and a word, since colour alone does not reach everyone."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def gib(size_bytes: float, digits: int = 1) -> str:
    """Bytes in GiB: 13367487 -> "0.0 GiB"."""
    return f"{size_bytes / GIB:,.{digits}f} GiB"


def size(size_bytes: int) -> str:
    """Bytes in the unit that shows them: GiB with two digits, below a tenth of one MiB, below that KiB."""
    if size_bytes >= GIB / 10:
        return f"{size_bytes / GIB:,.2f} GiB"
    if size_bytes >= 2**20 / 10:
        return f"{size_bytes / 2**20:,.1f} MiB"
    return f"{size_bytes / 2**10:,.1f} KiB" if size_bytes else "0"


def signed_size(difference_bytes: int) -> str:
    """A difference in bytes with its sign, in the unit of `size`; "=" for none."""
    if not difference_bytes:
        return "="
    return ("+" if difference_bytes > 0 else "-") + size(abs(difference_bytes))


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: "350 ms", "42s", "3m 20s", "5h 07m", "2d 03h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m {whole % _MINUTE:02d}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h {whole % _HOUR // _MINUTE:02d}m"
    return f"{whole // _DAY:,}d {whole % _DAY // _HOUR:02d}h"


def plain(value: object, limit: int = 500) -> str:
    """Foreign text on one line: control characters become visible escapes, so that none reaches the terminal.

    Markup is not touched: whoever shows the result passes it as Text or Content, which parse none.
    """
    source = str(value)
    if len(source) <= limit and source.isprintable():
        return source
    cut = source[: limit + 1]
    shown = "".join(_visible(character) for character in cut)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _visible(character: str) -> str:
    if character == "\t":
        return " "
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def number(value: float | None, digits: int = 4) -> str:
    """A measured figure with so many significant digits, or a dash where none is known."""
    if value is None:
        return "-"
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.{max(0, digits - 2)}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
