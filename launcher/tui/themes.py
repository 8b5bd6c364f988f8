"""Colours: a dark and a light theme, and the colours of the memory components."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from textual.app import App
from textual.color import Color
from textual.theme import Theme

DARK = Theme(
    name="vramwise-dark",
    primary="#58a6ff",
    secondary="#39c5cf",
    accent="#d2a8ff",
    warning="#e3b341",
    error="#ff7b72",
    success="#56d364",
    foreground="#e6edf3",
    background="#0d1117",
    surface="#0d1117",
    panel="#161b22",
    dark=True,
    variables={
        "border": "#30363d",
        "footer-key-foreground": "#58a6ff",
        "muted": "#9aa4af",
        "track": "#30363d",
    },
)
LIGHT = Theme(
    name="vramwise-light",
    primary="#0969da",
    secondary="#1b7c83",
    accent="#8250df",
    warning="#9a6700",
    error="#cf222e",
    success="#1a7f37",
    foreground="#1f2328",
    background="#ffffff",
    surface="#ffffff",
    panel="#f0f3f6",
    dark=False,
    variables={
        "border": "#d0d7de",
        "footer-key-foreground": "#0969da",
        "muted": "#57606a",
        "track": "#d0d7de",
    },
)

LEAST_CONTRAST = 4.5
"""Of muted text with what it stands on: level AA of the Web Content Accessibility Guidelines 2.2 (1.4.3)."""
_MUTING = (0.4, 0.3, 0.2, 0.1)
_TRACK = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Colours:
    """The colours of the present theme that texts are drawn in, in Rich's words.

    `background` is what text on a badge is drawn in, `track` the part of a bar that is still to come.
    """

    muted: str
    primary: str
    success: str
    warning: str
    error: str
    accent: str
    background: str
    panel: str
    track: str

    def named(self, name: str) -> str:
        """The colour of a name; muted where there is none of it."""
        return str(getattr(self, name, self.muted))


def colours(app: App[Any]) -> Colours:
    """The colours of the theme that an application shows now."""
    variables = app.theme_variables
    found = {field.name: _in_rich(variables[field.name]) for field in fields(Colours)}
    if app.current_theme.ansi:
        # The terminal's own background is known by no colour that text can be drawn in.
        found["background"] = _in_rich(variables["ansi-background"])
    return Colours(**found)


def completed(theme: Theme, variables: dict[str, str]) -> dict[str, str]:
    """A theme's variables with those that this interface needs and other themes lack: `muted` and `track`."""
    if theme.ansi:
        # Bright black is the background of some terminals with a dark palette (Solarized).
        grey = "ansi_white" if theme.dark else "ansi_bright_black"
        return {"muted": grey, "track": grey, **variables}
    text, ground = Color.parse(variables["foreground"]), Color.parse(variables["background"])
    grounds = (ground, Color.parse(variables["panel"]))
    muted = next((c for c in (text.blend(ground, s) for s in _MUTING) if _readable(c, grounds)), text)
    return {"muted": muted.hex, "track": text.blend(ground, _TRACK).hex, **variables}


def contrast(one: Color, other: Color) -> float:
    """Contrast ratio of two colours, 1 to 21 (Web Content Accessibility Guidelines 2.2)."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _readable(text: Color, grounds: Iterable[Color]) -> bool:
    return all(contrast(text, ground) >= LEAST_CONTRAST for ground in grounds)


def _luminance(colour: Color) -> float:
    """Relative luminance (Web Content Accessibility Guidelines 2.2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour.normalized
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _in_rich(colour: str) -> str:
    """Textual's name of a colour in Rich's words."""
    return "default" if colour == "transparent" else colour.removeprefix("ansi_")


# Hues of middling lightness, neighbours far apart: segments part on dark and light backgrounds.
_PALETTE = (
    "#4c8dff",
    "#17b3a6",
    "#9b8cff",
    "#f2a33a",
    "#e8609a",
    "#6cbf4b",
    "#f0684d",
    "#3fb8e0",
    "#c678dd",
    "#b8a038",
    "#8793a3",
    "#b07d56",
    "#d08fb8",
    "#5f9e86",
    "#d9c27a",
)


def component_colours(names: Iterable[str]) -> dict[str, str]:
    """Colour of each component by its place in the list, empty ones counted so that colours stay."""
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}
