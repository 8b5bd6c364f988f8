"""Settings that a person keeps: one TOML file in the user's config folder.

Every command that asks for what it has reads it; the terminal interface writes it too.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from planner.base import validate
from planner.base.data_files import write_atomically
from planner.base.errors import FieldError, InputError, UnknownNameError
from planner.base.values import dataclass

FILE_NAME = "config.toml"
SESSION = "session"
"""Table of the file that holds where the terminal interface was left; commands do not read it."""
MAX_PRICE = 1e6
_WORDS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is taken where a command is not told; null where nothing is kept.

    `gpu` is what --gpu takes, `display` and `price_per_hour` are of that card alone. `runs` is the folder of
    run folders, `theme` one of the terminal interface's, `unsloth_python` the interpreter of the environment
    that Unsloth is installed in.
    """

    gpu: str | None = None
    display: bool | None = None
    price_per_hour: float | None = None
    runs: str | None = None
    theme: str | None = None
    unsloth_python: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Where the terminal interface was left; null where it was not."""

    model: str | None = None
    data: str | None = None


HELP = {
    "gpu": "card that plan and tui begin with: 16GB, rtx-4090, 2x24GB",
    "display": "whether a display is attached to that card: on or off",
    "price_per_hour": "US dollars for an hour of one such GPU",
    "runs": "folder of run folders",
    "theme": "theme of the terminal interface",
    "unsloth_python": "Python of the environment that Unsloth is installed in, for train --engine",
}
NAMES = tuple(field.name for field in fields(Settings))
_KINDS: dict[str, type] = {"display": bool, "price_per_hour": float}


def settings_path() -> Path:
    """The file, which need not be there; `VRAMWISE_DATA_DIR` has it where set."""
    override = os.environ.get("VRAMWISE_DATA_DIR")
    if override:
        return Path(override) / FILE_NAME
    import platformdirs

    return Path(platformdirs.user_config_dir("vramwise", appauthor=False)) / FILE_NAME


def load_settings() -> Settings:
    """The settings; without a file there are none.

    Raises:
        InputError: the file cannot be read, or says something else than settings; it is named.
    """
    return Settings(**{name: value for name, value in _read().items() if name != SESSION})


def load_session() -> Session:
    """Where the terminal interface was left.

    Raises:
        InputError: as load_settings.
    """
    return Session(**_read().get(SESSION, {}))


def change_setting(name: str, value: object) -> None:
    """Keep a setting, or with None forget it; the others stay as they are.

    Raises:
        InputError: as load_settings, or a name or value that is not accepted, or the file cannot be written.
    """
    _check_name(name)
    values = _read()
    if value is None:
        values.pop(name, None)
    else:
        values[name] = _checked(name, value)
    _write(values)


def keep_session(session: Session) -> None:
    """Keep where the terminal interface was left.

    Raises:
        InputError: as change_setting.
    """
    told = {field.name: getattr(session, field.name) for field in fields(Session)}
    _write({**_read(), SESSION: {name: value for name, value in told.items() if value is not None}})


def parse_setting(name: str, text: str) -> object:
    """The value that a text stands for.

    Raises:
        InputError: no such setting, or a value that it does not accept.
    """
    _check_name(name)
    kind = _KINDS.get(name, str)
    if kind is bool:
        return _checked(name, _WORDS.get(text.lower(), text))
    if kind is float:
        try:
            return _checked(name, float(text))
        except ValueError:
            return _checked(name, text)
    return _checked(name, text)


def card_asked_for(
    gpu: str | None, *, display: bool, price_per_hour: float | None
) -> tuple[str | None, bool, float | None]:
    """Card, display and price of a command: as told; where no card is, the settings'.

    Raises:
        InputError: as load_settings.
    """
    if gpu is not None:
        return gpu, display, price_per_hour
    kept = load_settings()
    attached = display or (kept.gpu is not None and bool(kept.display))
    return kept.gpu, attached, kept.price_per_hour if price_per_hour is None else price_per_hour


def _read() -> dict[str, Any]:
    import tomllib

    path = settings_path()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    try:
        for name, value in values.items():
            if name == SESSION:
                _check_session(value)
            else:
                _check_name(name)
                values[name] = _checked(name, value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return values


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise UnknownNameError("setting", name, list(NAMES), f"(one of {', '.join(NAMES)})")


def _checked(name: str, value: object) -> object:
    kind = _KINDS.get(name, str)
    if kind is bool:
        if not isinstance(value, bool):
            raise FieldError(name, value, "on or off")
        return value
    if kind is float:
        return float(validate.number(name, value, minimum=0.0, maximum=MAX_PRICE))
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise FieldError(name, value, "a text")
    return value


def _check_session(value: object) -> None:
    known = {field.name for field in fields(Session)}
    if not isinstance(value, dict) or any(
        name not in known or not isinstance(one, str) for name, one in value.items()
    ):
        raise InputError(f"[{SESSION}]: expected texts called {', '.join(sorted(known))}")


def _write(values: dict[str, Any]) -> None:
    """Write the file; tomllib has no writer, and texts, numbers and truth in TOML are those of JSON."""
    plain = {name: value for name, value in values.items() if name != SESSION}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in plain.items()]
    session = values.get(SESSION)
    if session:
        lines += ["", f"[{SESSION}]"]
        lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in session.items()]
    path = settings_path()
    try:
        write_atomically(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
