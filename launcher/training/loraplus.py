"""LoRA+: lora_B learns faster than lora_A (https://arxiv.org/abs/2402.12354), by PEFT's groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


def loraplus_optimizer(trainer: Trainer, model: Any, ratio: float) -> torch.optim.Optimizer:
    """The optimizer that the trainer's arguments name, `ratio` times as fast for lora_B."""
    from peft.optimizers import create_loraplus_optimizer

    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    made: torch.optim.Optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=trainer.args.weight_decay, **options
    )
    return made
