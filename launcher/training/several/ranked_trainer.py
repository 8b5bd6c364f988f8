"""SFTTrainer on several ranks: what upstream saves, loads or counts otherwise there than in one process.

Imported by the training process alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from launcher.training.several import random_states, whole
from launcher.training.several.checkpoints import Gathered, gather, load_adapter
from launcher.training.several.ranks import ALONE, Ranks
from launcher.training.sparing import SparingTrainer


class RankedTrainer(SparingTrainer):
    """SparingTrainer whose checkpoints are those of one process, whatever the number of ranks and shards."""

    ranks: Ranks = ALONE
    _gathered: Gathered | None = None

    @property
    def shards(self) -> bool:
        """Whether FSDP2 has sharded the model."""
        return bool(self.is_fsdp_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; upstream would gather the frozen base as well."""
        if self.shards:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def gather(self) -> None:
        """Before a save: have rank 0 hold all that the ranks would write. Every rank must be here."""
        if not self.ranks.alone:
            self._gathered = None
            super().store_flos()
            self._gathered = gather(self)

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """What is trained, as gathered; None where it was not."""
        return None if self._gathered is None else self._gathered.weights

    def forget_gathered(self) -> None:
        """After a save."""
        self._gathered = None

    def store_flos(self) -> None:
        """Add up all ranks' operations, which a save by one of them cannot."""
        if self._gathered is None:
            super().store_flos()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shards or self._gathered is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self._gathered.optimizer, Path(output_dir) / OPTIMIZER_NAME)
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._gathered is None:
            super()._save_rng_state(output_dir)
            return
        for name, content in self._gathered.random_states.items():
            (Path(output_dir) / name).write_bytes(content)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.ranks.alone or checkpoint is None:
            super()._load_rng_state(checkpoint)
        else:
            random_states.restore(Path(checkpoint), self.ranks.rank)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.shards:
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = _read(Path(checkpoint) / OPTIMIZER_NAME)
        whole.load_optimizer_state(whole.innermost(self.optimizer), state)
        self.lr_scheduler.load_state_dict(_read(Path(checkpoint) / SCHEDULER_NAME))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _read(path: Path) -> Any:
    """A state of a checkpoint, as transformers reads it in one process: tensors and numbers, no code."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
