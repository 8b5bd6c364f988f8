"""Whether the weights that a run loads are on this machine: told before data and libraries are read.

Light: no torch. Only safetensors are loaded (launcher/training/build.py): one file, or those of an index.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from planner.base.errors import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""transformers/utils/__init__.py: SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME."""
Find = Callable[[str], Path | None]
"""Where a file of the model is; None where it is not."""


def require_weights(source: str, *, download_bytes: int | None, allow_download: bool) -> str | None:
    """What is fetched before the run, in a line, or None where all weights of a folder or Hub id are here.

    `download_bytes` is the size of the weights as published, None where that is not known.

    Raises:
        InputError: they are not here, and nothing may or can fetch them.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        absent = _absent(lambda name: folder / name if (folder / name).is_file() else None)
        if absent is not None:
            raise InputError(f"{source}: {absent}{_other_weights(folder)}")
        return None
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(source, name)
        return Path(found) if isinstance(found, str) else None

    try:
        absent = _absent(cached)
    except HFValidationError as error:
        raise InputError(f"{source}: neither a folder here nor a Hub id") from error
    if absent is None:
        return None
    size = "them" if download_bytes is None else f"{download_bytes / 2**30:,.1f} GiB"
    if allow_download and not constants.HF_HUB_OFFLINE:
        return f"the weights of {source} are not on this machine: {size} are fetched from the Hub"
    how = "HF_HUB_OFFLINE is set" if allow_download else f"--allow-download fetches {size}"
    raise InputError(f"the weights of {source} are not on this machine; {how}")


def _absent(find: Find) -> str | None:
    """What is missing of the weights; None where nothing is."""
    if find(WHOLE) is not None:
        return None
    index = find(INDEX)
    if index is None:
        return f"no weights in it ({WHOLE}, or {INDEX} with the files that it names)"
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{INDEX} is no index of weights: {type(error).__name__}"
    missing = [name for name in named if find(name) is None]
    return (
        f"{len(missing)} of its {len(named)} files of weights are missing: {missing[0]}" if missing else None
    )


def _other_weights(folder: Path) -> str:
    """What else a folder holds that may have been meant, as the end of a sentence."""
    if any(folder.glob("*.bin")):
        return "; its .bin files are pickles, which vramwise does not load: save the model as safetensors"
    if any(folder.glob("*.gguf")):
        return "; GGUF is not trained: name the model that it was made from"
    return ""
