"""Where shipped data and the user's own data live."""

from __future__ import annotations

import os
from pathlib import Path

PROFILES = Path(__file__).resolve().parent.parent / "profiles"


def user_data_dir() -> Path:
    """Folder of the user's own records, calibrations and inspected models (not created here).

    `VRAMWISE_DATA_DIR` overrides the platform's default.
    """
    override = os.environ.get("VRAMWISE_DATA_DIR")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_data_dir("vramwise", appauthor=False))


def user_cache_dir() -> Path:
    """Folder of what can be worked out again (not created here); within `VRAMWISE_DATA_DIR` where set."""
    override = os.environ.get("VRAMWISE_DATA_DIR")
    if override:
        return Path(override) / "cache"
    import platformdirs

    return Path(platformdirs.user_cache_dir("vramwise", appauthor=False))


def write_atomically(path: Path, text: str) -> None:
    """Write text so that a reader or a crash sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
