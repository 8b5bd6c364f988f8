"""PlanCallback: has a script's trainer run as planned, and compares predicted with measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.runs.report.facts import memory_figures, predicted_rate
from launcher.runs.summary import RunSummary
from launcher.training import build
from launcher.training.callbacks import EventCallback, PartialCheckpointing, QuietHeap
from launcher.training.watching.memory_meter import MemoryMeter
from planner.answers.plan import Plan
from vramwise.arguments import refuse_in_script
from vramwise.comparison import Comparison, Difference
from vramwise.differences import differences, of_rows


class PlanCallback(TrainerCallback):  # type: ignore[misc]
    """For the `callbacks` of TRL's SFTTrainer.

    It sets what no argument says (compiled layers, checkpointing of some layers or of all but attention,
    float32 products in TF32), measures peaks and tokens a second, and gives `tell` a line for each figure and
    for everything that is not as planned: what can be told before the first step is told then. `comparison`
    has them as values; it is null before the training's end.

    Raises:
        InputError: the plan cannot be run by a script.
    """

    def __init__(self, plan: Plan, *, tell: Callable[[str], None] = print) -> None:
        refuse_in_script(plan.setup)
        self.plan = plan
        self.comparison: Comparison | None = None
        self._tell = tell
        self._differences: tuple[Difference, ...] = ()
        self._summary = RunSummary()
        self._parts: list[TrainerCallback] = [QuietHeap()]

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set on the model and on torch what the plan has and no argument says."""
        setup, model = self.plan.setup, kwargs["model"]
        on_gpu = not args.use_cpu and torch.cuda.is_available()
        if on_gpu:
            build.use_card(setup)
            torch.cuda.reset_peak_memory_stats()
        if setup.dtype == "float16":
            build.hold_trainables_in_float32(model)
        if setup.selective_checkpointing:
            from trl.models import enable_selective_activation_checkpointing

            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            enable_selective_activation_checkpointing(base)
        if setup.checkpointed_layers is not None:
            self._parts.append(PartialCheckpointing(setup.checkpointed_layers))
        if setup.compile == "regional":
            from launcher.training.compilation import compile_decoder_layers

            budget = setup.activation_memory_budget
            self._parts.append(compile_decoder_layers(model, activation_memory_budget=budget))
        self._parts.append(
            EventCallback(
                write=self._summary.take,
                meter=MemoryMeter(self._summary.take, on_gpu, lambda: None),
                environment={},
                stop_requested=lambda: False,
            )
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell what is not as planned."""
        if state.global_step >= state.max_steps:
            self._parts.clear()
            return
        loader = kwargs.get("train_dataloader")
        rows = getattr(loader, "dataset", None)
        self._differences = (
            *differences(self.plan, args, kwargs["model"]),
            *of_rows(self.plan, rows),
        )
        for difference in self._differences:
            self._tell(f"not as planned: {difference}")
        self._each("on_train_begin", args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the step."""
        self._each("on_step_end", args, state, control, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count tokens and time."""
        self._each("on_log", args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the evaluation, and leave its time out."""
        self._each("on_evaluate", args, state, control, **kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the save, and leave its time out."""
        self._each("on_save", args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare."""
        self._each("on_train_end", args, state, control, **kwargs)
        measured = self._summary
        self.comparison = Comparison(
            memory=memory_figures(self.plan, measured.memory),
            predicted_tokens_per_second=predicted_rate(self.plan),
            measured_tokens_per_second=measured.tokens_per_second,
            differences=self._differences,
        )
        for line in self.comparison.lines:
            self._tell(line)

    def _each(self, event: str, *arguments: Any, **kwargs: Any) -> None:
        for part in self._parts:
            getattr(part, event)(*arguments, **kwargs)
