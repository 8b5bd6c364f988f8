"""One tensor of a checkpoint: where it lies and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies, its shape, and its dtype as safetensors names it.

    Of a weight that is stored quantised, shape and dtype are those that it stands for; `held_bytes` is what
    it takes with its constants, `parts` are their names and files.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    held_bytes: int | None = None
    parts: tuple[tuple[str, Path], ...] = ()

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.elements * _WIDTHS.get(self.dtype, 1)
