"""What runs inside the training loop: events, memory peaks, stopping, and refusing a poisoned step.

Imported by the training process alone.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.runs.events import (
    EvalEvent,
    Event,
    LogEvent,
    StartEvent,
)
from launcher.training.adapters import lorafa_optimizer
from launcher.training.dataset import FILES
from launcher.training.saving import KEPT_LOGS, CheckpointSaver, RandomStates, save_model
from launcher.training.several import whole
from launcher.training.several.ranked_trainer import RankedTrainer
from launcher.training.watching.memory_meter import MemoryMeter
from planner.base.errors import InputError, VramwiseError


class DivergedError(VramwiseError):
    """The loss or the gradient is not finite; the weights are still those of the step before."""


class NothingLeftError(VramwiseError):
    """The checkpoint that a run goes on from holds all of its steps; transformers would do one more."""


class EvaluationStoppedError(VramwiseError):
    """Somebody asked for an end while the run was evaluated."""


class LaunchedTrainer(RankedTrainer):
    """SFTTrainer that ends before an update by a non-finite loss or gradient, saves checkpoints whole, loads
    them exactly, and writes no model card.
    """

    left_in_16bit: tuple[str, ...] | None = None
    """Layers without the 8-bit products that the setup asks for: no such product takes their shape. Null
    where it asks for none."""
    optimizer: Any
    _signature_columns: Any
    lorafa: bool = False
    """Whether lora_A stays frozen and PEFT's LoRA-FA trains lora_B."""
    loraplus_lr_ratio: float | None = None
    """How many times lora_A's rate lora_B learns with, null for one rate (https://arxiv.org/abs/2402.12354)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[torch.Tensor] = []
        self._saver: CheckpointSaver | None = None
        self._random_states = RandomStates()
        self._staged: Path | None = None
        self._updates_from = -1  # the step whose weights an update has begun to change

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with PEFT's groups of rates or LoRA-FA where asked for."""
        if self.lorafa and self.optimizer is None:
            self.optimizer = lorafa_optimizer(self.model if model is None else model, self.args)
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            found: torch.optim.Optimizer = super().create_optimizer(model)
            return found
        from peft.optimizers import create_loraplus_optimizer

        trained: Any = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        made: torch.optim.Optimizer = create_loraplus_optimizer(
            trained,
            kind,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        self.optimizer = made
        return made

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if FILES not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, FILES]

    def save_with(self, saver: CheckpointSaver) -> None:
        """Save checkpoints by a saver of the run from here on."""
        self._saver = saver
        self.add_callback(self._random_states)

    def save_last_good(self) -> None:
        """Amid a step that cannot be done: save the state before it, unless a checkpoint holds it, or an
        update has begun that may have changed some of the weights.
        """
        step = self.state.global_step
        amid_update = self._updates_from == step
        if self._saver is not None and step > 0 and not (amid_update or self._saver.holds(step)):
            self.model.zero_grad(set_to_none=True)
            self._random_states.restore()
            self._save_checkpoint(self.model, trial=None)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass."""
        # With 8-bit products in this thread: autograd's own takes the host 8% longer where a step waits for
        # it. Others do not, and a thread less has a workspace of cuBLAS less (32 MiB), which plans count.
        threads = self.left_in_16bit is None or self.args.world_size > 1
        with torch.autograd.set_multithreading_enabled(threads):
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        # Looked at before the update: here the host would wait for the GPU, and the GPU then for the host.
        self._losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses = torch.stack(self._losses).float(), []
        finite = bool(torch.isfinite(losses).all())
        # All ranks end by it, in the same step.
        if self.ranks.any(not finite):
            broken = next((loss for loss in losses.tolist() if not math.isfinite(loss)), math.nan)
            raise DivergedError(f"the loss is {broken} in step {self.state.global_step + 1}")
        # With float16 the gradient scaler meets overflows by design and skips those steps itself.
        if not self.args.fp16 and not math.isfinite(float(norm)):
            raise DivergedError(f"the gradient norm is {float(norm)} in step {self.state.global_step + 1}")
        self._updates_from = self.state.global_step
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged.parent)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if self._saver is None or self._saver.holds(step):
            return
        if self.ranks.any(not _are_finite(self.model)):
            raise DivergedError(f"the weights are not finite after step {step}")
        del self.state.log_history[:-KEPT_LOGS]
        self.gather()

        def write_files(staged: Path) -> None:
            self._staged = staged
            try:
                super(LaunchedTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._staged = None

        self._saver.save(step, write_files)
        self.forget_gathered()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        weights = None if self._gathered is None else self._gathered.weights
        save_model(self.model, self.processing_class, folder, self.ranks, weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """PEFT's load_adapter, which upstream calls, would turn 16-bit adapters into float32."""
        if self.shards or not hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        set_peft_model_state_dict(self.model, weights)
        loaded = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        for name in weights.keys() | loaded.keys():
            wanted, found = weights.get(name), loaded.get(name)
            if wanted is None or found is None or not torch.equal(wanted, found.cpu()):
                raise InputError(f"{resume_from_checkpoint}: its weight {name} is not one of this adapter")

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        told = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = int(told[-1]) if told else 0

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random_states.take()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; a stop that is asked for meanwhile ends it after the batch, and no step is done then."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationStoppedError:
            self.control.should_training_stop = True
            self.control.should_save = self._saver is not None
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare the evaluation with the best one; one that was broken off says nothing."""
        return bool(metrics) and bool(super()._determine_best_metric(metrics, trial))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left out: upstream's asks the Hub about the base model, and can fail at the end of a run."""


def _are_finite(model: torch.nn.Module) -> bool:
    """Whether all that is trained is."""
    checks = [torch.isfinite(whole.local(p)).all() for p in model.parameters() if p.requires_grad]
    return bool(torch.stack(checks).all())


class QuietHeap(TrainerCallback):  # type: ignore[misc]
    """Takes what is there before training out of Python's garbage collection, which would go through half a
    million objects of the libraries again and again: 8% of a step's time on the host.
    """

    _thaws = True

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Freeze what is alive."""
        self._thaws = gc.get_freeze_count() == 0
        gc.collect()
        gc.freeze()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let it be collected again, but where libraries were frozen before: those are there to stay."""
        if self._thaws:
            gc.unfreeze()


class EventCallback(TrainerCallback):  # type: ignore[misc]
    """Writes start, log, memory, eval and checkpoint events, and stops when asked to."""

    def __init__(
        self,
        *,
        write: Callable[[Event], None],
        meter: MemoryMeter,
        environment: Mapping[str, str | int | float | None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._write = write
        self._meter = meter
        self._environment = environment
        self._stop_requested = stop_requested
        self._mark = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._tokens = 0
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Announce the run."""
        self._write(
            StartEvent(
                time=time.time(),
                total_steps=state.max_steps,
                environment=dict(self._environment),
                first_step=state.global_step,
            )
        )
        if state.global_step >= state.max_steps:
            raise NothingLeftError
        self._tokens = next((e["num_tokens"] for e in reversed(state.log_history) if "num_tokens" in e), 0)
        self._mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Count the step; the optimizer step's kernels may still run, and fall into the next one."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._steps += 1
        self._meter.close("step", state.global_step)
        if self._stop_requested() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_training_stop = True
            control.should_log = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Leave out the evaluation at an epoch's end that transformers makes wherever a run is stopped."""
        if self.stopped and not float(state.epoch or 0.0).is_integer():
            control.should_evaluate = False
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Turn the trainer's log of training steps into an event; evaluation and the summary have none."""
        if not logs or "loss" not in logs:
            return
        tokens = logs.get("num_tokens")
        step_seconds = self._seconds / self._steps if self._steps else None
        rate = (tokens - self._tokens) / self._seconds if tokens is not None and self._seconds > 0 else None
        self._write(
            LogEvent(
                time=time.time(),
                step=state.global_step,
                loss=float(logs["loss"]),
                learning_rate=_number(logs.get("learning_rate")),
                grad_norm=_number(logs.get("grad_norm")),
                tokens_per_second=rate,
                step_seconds=step_seconds,
                num_tokens=None if tokens is None else int(tokens),
                epoch=state.epoch,
            )
        )
        self._seconds, self._steps, self._tokens = 0.0, 0, tokens or 0

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Break off an evaluation when a stop is asked for.

        Raises:
            EvaluationStoppedError: to LaunchedTrainer.evaluate.
        """
        if self._stop_requested():
            self.stopped = state.global_step < state.max_steps
            raise EvaluationStoppedError("a stop was asked for during the evaluation")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the evaluation's loss and memory, and leave its time out of the steps'."""
        self._meter.close("evaluation", state.global_step)
        loss = _number((metrics or {}).get("eval_loss"))
        self._write(EvalEvent(time=time.time(), step=state.global_step, loss=loss))
        self._mark = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave its time out of the steps'."""
        self._meter.close("save", state.global_step)
        self._mark = time.perf_counter()


class PartialCheckpointing(TrainerCallback):  # type: ignore[misc]
    """Checkpoints the first `layers` decoder layers alone: TrainingSetup.checkpointed_layers."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch off what the trainer has switched on for all layers just before."""
        for layer in decoder_layers(kwargs["model"])[self._layers :]:
            layer.gradient_checkpointing = False


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated decoder layers, in order: those that transformers can checkpoint one by one, but for a
    vision tower's.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from launcher.training.loading.tower import tower_paths

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = tower_paths(base.config)[:1] if hasattr(base, "config") else ()
    seeing = {id(module) for path in tower for module in base.get_submodule(path).modules()}
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in seeing
    ]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
