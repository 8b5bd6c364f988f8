"""The data of a run, tokenised by one rank of a machine and mapped into memory by all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.runs.folder import RunFolder
from launcher.training.several.ranks import Ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    Made = tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]

FOLDER = ".rows"


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows that the first rank of this machine makes, and the others wait for."""

    folder: RunFolder
    ranks: Ranks

    @property
    def path(self) -> Path:
        """Where they lie while a run starts; what TRL makes of them (packing) lies beside them."""
        return self.folder.path / FOLDER

    def share(self, make: Callable[[], Made], tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Made:
        """What `make` gives on the first rank, with the rows on every one; the others take `tokenizer`'s."""
        if self.ranks.alone:
            return make()
        from datasets import load_from_disk

        used = None
        if self.ranks.tells:
            shutil.rmtree(self.path, ignore_errors=True)
            used, train, evaluated = make()
            train.save_to_disk(self.path / "train")
            if evaluated is not None:
                evaluated.save_to_disk(self.path / "eval")
        self.ranks.wait()
        eval_path = self.path / "eval"
        return (
            tokenizer() if used is None else used,
            load_from_disk(self.path / "train"),
            load_from_disk(eval_path) if eval_path.exists() else None,
        )

    def forget(self) -> None:
        """When all ranks have them: remove their files, which stay mapped."""
        if self.ranks.alone:
            return
        self.ranks.wait()
        if self.ranks.tells:
            shutil.rmtree(self.path, ignore_errors=True)
