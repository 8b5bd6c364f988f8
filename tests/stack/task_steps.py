"""A whole training step of TRL's trainers beside SFTTrainer, on small models on the CPU: the storages that it
makes, as on a GPU.

On a GPU a tile of logits is folded by a Triton kernel, which allocates nothing, and products are summed up in
place (trl/kernels/chunked_logprob.py); on a CPU torch operations with copies in fp32 stand in for both, and
every row is scored whether it has a label or not. Here the CPU's do nothing, and rows are picked as on a GPU.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from trl.kernels import chunked_logprob
from trl.trainer import utils

from launcher.measuring.measured_run import _quiet, _tokenizer
from launcher.training import build
from planner.setup.training_setup import TrainingSetup

from .like_cuda import like_cuda
from .live_bytes import LiveBytes, tensors_of
from .small_models import VOCABULARY, load_model, load_scored

TILE = 256
"""Entries of the vocabulary in a tile here: TRL's 32,768 would hide what layers hold."""
SHORTER = 3
"""Tokens by which rejected answers are shorter than chosen ones, so that batches are padded."""


class Course(LiveBytes):
    """Says of its peak whether that was in a pass that keeps nothing."""

    keeps_nothing = False

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.peak_bytes
        result = super().__torch_dispatch__(*args, **kwargs)
        if self.peak_bytes > before:
            in_backward = torch._C._current_graph_task_id() != -1
            self.keeps_nothing = not torch.is_grad_enabled() and not in_backward
        return result


class _MeasuredError(Exception):
    """Ends the trainer after its first step."""


@contextmanager
def gpu_head() -> Iterator[None]:
    """TRL's output head as a GPU runs it, in small tiles; dropout and autocast as there."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch, like_cuda():
        patch.setattr(utils, "_use_triton", lambda _: True)
        patch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE)
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            patch.setattr(chunked_logprob, name, nothing)
        yield


def step_of(family: str, setup: TrainingSetup, folder: Path) -> Course:
    """The first step of the setup's task, forward and backward, from a collated batch on.

    Prompts have one token.
    """
    reached: list[Course] = []
    with _quiet():
        trainer, held = _TRAINERS[setup.task](family, setup, folder)
        run = trainer.training_step

        def measured(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> None:
            given = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
            gc.collect()
            with Course([*tensors_of(trainer.model), *held, *given], values=False) as live:
                run(model, inputs, num_items_in_batch)
            reached.append(live)
            raise _MeasuredError

        trainer.training_step = measured
        with suppress(_MeasuredError):
            trainer.train()
    return reached[0]


def _tokens(count: int) -> list[int]:
    found: list[int] = torch.randint(0, VOCABULARY, (count,)).tolist()
    return found


def _arguments(setup: TrainingSetup, folder: Path) -> dict[str, Any]:
    checkpoints = {"use_reentrant": False} if setup.gradient_checkpointing else None
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": setup.per_device_train_batch_size,
        "bf16": setup.dtype == "bfloat16",
        "use_cpu": True,
        "optim": "adamw_torch",
        "gradient_checkpointing": setup.gradient_checkpointing,
        "gradient_checkpointing_kwargs": checkpoints,
        "report_to": "none",
        "max_steps": 1,
        "disable_tqdm": True,
    }


def _rows(setup: TrainingSetup, row: Callable[[int], dict[str, Any]]) -> Dataset:
    """A micro-batch of rows, each made for answers of so many tokens."""
    return Dataset.from_list([row(setup.max_length - 1) for _ in range(setup.per_device_train_batch_size)])


def _trainer(
    kind: Any, config: Any, setup: TrainingSetup, model: Any, data: Dataset, folder: Path, **more: Any
) -> Any:
    """A trainer of that kind on rows that are tokens already."""
    given = {"precompute_ref_log_probs": True} if setup.precompute_ref_log_probs else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_prepare_dataset", lambda _, dataset, *__: dataset)
        return kind(
            model=model,
            args=config(**_arguments(setup, folder), max_length=setup.max_length, **given),
            train_dataset=data,
            processing_class=_tokenizer(),
            **more,
        )


def _reference(family: str, setup: TrainingSetup) -> Any:
    """The second model that there is where no adapter can be disabled."""
    holds = setup.method == "full" and setup.reference_passes
    return load_model(family, setup) if holds else None


def _preferences(family: str, setup: TrainingSetup, folder: Path) -> tuple[Any, list[torch.Tensor]]:
    """DPOTrainer on pairs, and the tensors of its reference."""
    data = _rows(
        setup,
        lambda length: {
            "prompt_ids": [1],
            "chosen_ids": _tokens(length),
            "rejected_ids": _tokens(length - SHORTER),
        },
    )
    model, reference = load_model(family, setup), _reference(family, setup)
    more = {"ref_model": reference, "peft_config": build.lora_config(setup, model)}
    trainer = _trainer(trl.DPOTrainer, trl.DPOConfig, setup, model, data, folder, **more)
    return trainer, [] if reference is None else tensors_of(reference)


def _answers(family: str, setup: TrainingSetup, folder: Path) -> tuple[Any, list[torch.Tensor]]:
    """KTOTrainer on answers, good and bad in turn, and the tensors of its reference."""
    turns = itertools.cycle((True, False))
    data = _rows(
        setup,
        lambda length: {
            "prompt_ids": [1],
            "completion_ids": _tokens(length),
            "KL_completion_ids": _tokens(length),
            "label": next(turns),
        },
    )
    model, reference = load_model(family, setup), _reference(family, setup)
    more = {"ref_model": reference, "peft_config": build.lora_config(setup, model)}
    trainer = _trainer(trl.KTOTrainer, trl.KTOConfig, setup, model, data, folder, **more)
    return trainer, [] if reference is None else tensors_of(reference)


def _scores(family: str, setup: TrainingSetup, folder: Path) -> tuple[Any, list[torch.Tensor]]:
    """RewardTrainer on pairs."""
    data = _rows(
        setup,
        lambda length: {
            "chosen_ids": _tokens(length + 1),
            "rejected_ids": _tokens(length + 1 - SHORTER),
        },
    )
    model = load_scored(family, setup)
    adapter = build.lora_config(setup, model)
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"
    return _trainer(trl.RewardTrainer, trl.RewardConfig, setup, model, data, folder, peft_config=adapter), []


_TRAINERS = {"dpo": _preferences, "kto": _answers, "reward": _scores}
