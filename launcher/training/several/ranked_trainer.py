"""SFTTrainer on several ranks: what upstream saves, loads or counts otherwise there than in one process.

Imported by the training process alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from launcher.training.several import whole
from launcher.training.several.ranks import ALONE, Ranks
from launcher.training.sparing import SparingTrainer


class RankedTrainer(SparingTrainer):
    """SparingTrainer whose checkpoints are those of one process, whatever the number of ranks and shards."""

    ranks: Ranks = ALONE

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole.optimizer_state(_innermost(self.optimizer), keep=self.ranks.saves)
        if self.ranks.saves:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read = {"map_location": "cpu", "weights_only": True}
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, mmap=True, **read)
        whole.load_optimizer_state(_innermost(self.optimizer), state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, **read))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
