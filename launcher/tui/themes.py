"""Colours: a dark and a light theme, and the colours of the memory components."""

from __future__ import annotations

from collections.abc import Iterable

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
    variables={"border": "#30363d", "footer-key-foreground": "#58a6ff", "muted": "#9aa4af"},
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
    variables={"border": "#d0d7de", "footer-key-foreground": "#0969da", "muted": "#57606a"},
)

# Twelve hues of middling lightness, neighbours far apart: segments part on dark and light backgrounds.
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
)


def component_colours(names: Iterable[str]) -> dict[str, str]:
    """Colour of each component by its place in the list, empty ones counted so that colours stay."""
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}
