"""Training steps of small models on the CPU, up to where the decoder stack begins: what the launcher builds
and TRL's trainer makes of it (adapter, casts, checkpoints, collated batch), measured op by op.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.measuring.measured_data import token_dataset
from launcher.measuring.measured_run import _quiet, _tokenizer
from launcher.runs.training_job import TrainingJob
from launcher.training import build
from planner.setup.training_setup import TrainingSetup

from .live_bytes import LiveBytes, tensors_of
from .small_models import VOCABULARY, load_model

STACK_INPUTS = ("input_ids", "position_ids", "attention_mask")


class _StepReachedError(Exception):
    """Ends the trainer where its first step would begin."""


@dataclass(frozen=True, kw_only=True)
class RealStep:
    """A model as the trainer trains it, and the first micro-batch that its collator made."""

    setup: TrainingSetup
    model: Any
    inputs: dict[str, Any]

    @property
    def stack(self) -> Any:
        """Embeddings, decoder layers and final norm."""
        return (self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model).model

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that transformers' trainer computes in: none in fp32."""
        if self.setup.dtype == "float32":
            return nullcontext()
        found: AbstractContextManager[Any] = torch.autocast("cpu", dtype=torch.bfloat16)
        return found


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Live bytes of a decoder stack's step: what forward keeps, and both passes' peaks."""

    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    kept: str


def first_step(family: str, setup: TrainingSetup, folder: Path) -> RealStep:
    """Build and start a run; packed sequences are made of two of half the length."""
    reached: list[tuple[Any, dict[str, Any]]] = []

    def stop(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> None:
        reached.append((model, inputs))
        raise _StepReachedError

    length = setup.max_length // 2 if setup.packing else setup.max_length
    count = setup.per_device_train_batch_size * (2 if setup.packing else 1)
    rows = torch.randint(0, VOCABULARY, (count, length)).tolist()
    with _quiet():
        trainer = build.build_trainer(
            setup,
            TrainingJob(setup=setup, model_source=family, data_path="random tokens", max_steps=1),
            model=load_model(family, setup),
            tokenizer=_tokenizer(),
            train_dataset=token_dataset(rows),
            eval_dataset=None,
            output_dir=folder,
            on_gpu=False,
        )
        setattr(trainer, "training_step", stop)  # noqa: B010 - replaced on this one trainer
        with suppress(_StepReachedError):
            trainer.train()
    model, inputs = reached[0]
    return RealStep(setup=setup, model=model.train(), inputs=inputs)


def measure(step: RealStep, *, values: bool = True) -> Measured:
    """Forward and backward of the decoder stack, without the head; see LiveBytes of `values`."""
    inputs = {name: step.inputs[name] for name in STACK_INPUTS if name in step.inputs}
    gc.collect()
    with LiveBytes([*tensors_of(step.model), *inputs.values()], values=values) as live:
        with step.autocast():
            output = step.stack(**inputs, use_cache=False).last_hidden_state
        forward, saved, kept = live.peak_bytes, live.live_bytes, live.by_operation()
        own = output.untyped_storage().nbytes()
        gradient = torch.empty_like(output)
        live.reset_peak()
        output.backward(gradient)
        backward = live.peak_bytes
    return Measured(
        saved_bytes=saved - own,
        forward_bytes=forward,
        backward_bytes=backward - 2 * own,
        kept=", ".join(f"{operation} {size:,}" for operation, size in kept.most_common()),
    )
