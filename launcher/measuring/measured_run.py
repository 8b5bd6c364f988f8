"""One run of a profile: build the model with random weights, train a few steps, read what was used."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.measuring.measured_data import TokenCounter, random_rows, token_dataset
from launcher.measuring.profile import Profile
from launcher.training.several.ranks import ALONE, Ranks
from planner.base.data_files import PROFILES
from planner.calibration.records import MeasuredPhase

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

WARM_UP_STEPS = 2
"""Optimizer state is born in the first step, kernels are compiled in it; the second settles the allocator."""
STEADY_SECONDS, MOST_STEPS = 2.5, 10
"""Short steps are repeated for so long, at most so often: they wait for the host, whose pace changes from one
to the next: 0.49 and 0.61 s (run 20261122-7e3203c71714), 0.52 and 0.41 (20261122-18f7a01e5f30).
"""


def most_steps(profile: Profile) -> int:
    """Steps after warm-up, at most; runs on lengths of real data count the tokens of those they ask for."""
    return profile.steps if profile.lengths else max(profile.steps, MOST_STEPS)


def load_config(model_id: str) -> PretrainedConfig:
    """transformers' config of a catalog model or of a folder, of its language part where it is multimodal and
    the catalog does not have the whole.
    """
    from transformers import AutoConfig

    from planner.models.checkpoint import is_dequantised
    from planner.models.hub_config import text_part

    folder = Path(model_id)
    path = folder / "config.json" if folder.is_dir() else PROFILES / "configs" / f"{model_id}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    from launcher.measuring.measured_images import processor_path

    if processor_path(model_id).is_file():
        return AutoConfig.for_model(values.pop("model_type"), **values)
    text, _ = text_part(values)
    text.pop("auto_map", None)
    if is_dequantised(text):
        text.pop("quantization_config")
    return AutoConfig.for_model(text.pop("model_type"), **text)


class MeasuredRun:
    """One profile's run: the model, its trainer and what was measured."""

    def __init__(
        self,
        profile: Profile,
        device: torch.device,
        driver_bytes: Callable[[], int] | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.profile = profile
        self.ranks = ranks
        self.weights_bytes = 0
        self.phases: list[MeasuredPhase] = []
        self.step_seconds: list[float] = []
        self.micro_steps: list[int] = []
        self._useful_tokens = self._processed_tokens = 0
        self.update_seconds: list[float] = []
        self.losses: tuple[float, ...] = ()
        self.first_step_seconds: float | None = None
        self._device = device
        self._driver_bytes = driver_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second over the steps after warm-up, padding included where the data has real lengths."""
        steady = self._steady
        if not steady:
            return None
        if self.profile.lengths:
            # Workers that read images count in their own processes.
            return self._processed_tokens / sum(steady) if self._processed_tokens else None
        setup = self.profile.setup
        tokens = setup.tokens_per_micro_step * setup.gradient_accumulation_steps * setup.num_processes
        return tokens * len(steady) / sum(steady)

    @property
    def useful_tokens_per_second(self) -> float | None:
        """The examples' own tokens a second over the same steps; None without the profile's lengths."""
        steady = self._steady
        return self._useful_tokens / sum(steady) if steady and self._useful_tokens else None

    def _count(self, counter: TokenCounter) -> None:
        """Count the tokens of the steps after warm-up."""
        first, last = sum(self.micro_steps[:WARM_UP_STEPS]), sum(self.micro_steps)
        self._useful_tokens = sum(counter.useful[first:last])
        self._processed_tokens = sum(counter.processed[first:last])

    def execute(self) -> str:
        """Train; returns the outcome."""
        import torch

        try:
            with tempfile.TemporaryDirectory() as folder, _quiet():
                self._train(Path(folder))
        except torch.OutOfMemoryError:
            return "oom"
        return "ok"

    def _train(self, folder: Path) -> None:
        import torch

        from launcher.measuring.measured_images import DRAWN_LEARNING_RATE, drawn_images
        from launcher.runs.training_job import TrainingJob
        from launcher.training import build

        setup = self.profile.setup
        config = load_config(setup.model)
        on_gpu = self._device.type == "cuda"
        drawn = drawn_images(setup, config) if setup.image_patches else None
        job = TrainingJob(
            setup=setup, model_source=setup.model, data_path="random tokens", max_steps=self._most_steps
        )
        if drawn is not None:
            job = replace(job, learning_rate=DRAWN_LEARNING_RATE)
        self._forget_peaks()
        model = self._model(config, seed=job.seed)
        self._wait()
        self.weights_bytes = torch.cuda.memory_allocated() if on_gpu else 0
        self._close("load")
        if drawn is None:
            rows = random_rows(self.profile, self._most_steps, config.vocab_size)
            data, eval_data = (
                token_dataset(rows),
                token_dataset(rows[: 2 * setup.per_device_train_batch_size]),
            )
        else:
            data = eval_data = drawn.rows
        trainer = build.build_trainer(
            setup,
            job,
            model=model,
            tokenizer=_tokenizer() if drawn is None else drawn.tokenizer,
            train_dataset=data,
            eval_dataset=eval_data if self.profile.evaluates else None,
            output_dir=folder,
            on_gpu=on_gpu,
            callbacks=[self._step_clock()],
            images=None if drawn is None else (drawn.tokens, drawn.processor),
        )
        trainer.ranks = self.ranks
        trainer.args.eval_strategy = "no"
        if self.profile.padded:
            # Drawn at random, the short rows could make up a batch, and every batch after warm-up.
            trainer.args.train_sampling_strategy = "sequential"
        counter = TokenCounter(trainer.data_collator)
        trainer.data_collator = counter
        trainer.train()
        self._wait()
        self._count(counter)
        self.losses = tuple(one["loss"] for one in trainer.state.log_history if "loss" in one)
        self._close("step")
        if self.profile.evaluates:
            trainer.evaluate()
            self._close("evaluation")
            trainer.save_model(str(folder / "saved"))
            self._close("save")

    def _model(self, config: PretrainedConfig, *, seed: int) -> Any:
        """The model with random weights, as the setup holds it."""
        from launcher.measuring.random_weights import build_random_model, random_filling
        from launcher.training import build
        from launcher.training.loading.tower import tower_paths

        setup = self.profile.setup
        if setup.distributed == "fsdp":
            from launcher.training.several.sharding import sharded_model

            filling = random_filling(build.torch_dtype(setup))
            return sharded_model(setup, config, filling, device=self._device, seed=seed)
        return build_random_model(
            config,
            dtype=build.torch_dtype(setup),
            device=self._device,
            attn_implementation=setup.attn_implementation,
            quantization_config=build.quantization_config(setup, tower_paths(config)),
            quantizes_experts=setup.experts == "4bit",
        )

    def _data(self, config: PretrainedConfig) -> tuple[Any, Any]:
        """Random tokens to train, and some of them to evaluate on."""
        rows = random_rows(self.profile, self._most_steps, config.vocab_size)
        return token_dataset(rows), token_dataset(rows[: 2 * self.profile.setup.per_device_train_batch_size])

    @property
    def _most_steps(self) -> int:
        return WARM_UP_STEPS + most_steps(self.profile)

    def _wait(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _forget_peaks(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @property
    def _steady(self) -> list[float]:
        return self.step_seconds[WARM_UP_STEPS:]

    def steady_enough(self) -> bool:
        """Whether the steps after warm-up are as many as the profile asks for, and took long enough."""
        return len(self._steady) >= self.profile.steps and sum(self._steady) >= STEADY_SECONDS

    def _step_clock(self) -> Any:
        """A callback that times steps and their updates, the GPU's work included, counts the micro-steps of
        each, starts peaks anew after warm-up and ends training when the steady steps are enough. The trainer
        has read the gradient's norm just before an update: nothing is waited for twice.
        """
        from transformers import TrainerCallback

        seconds, updates, micro_steps = self.step_seconds, self.update_seconds, self.micro_steps
        enough, wait, forget_peaks, ranks = self.steady_enough, self._wait, self._forget_peaks, self.ranks
        measured = self

        class StepClock(TrainerCallback):  # type: ignore[misc]
            begun = started = updating = 0.0
            passed = 0

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                self.begun = time.perf_counter()

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                wait()
                if len(seconds) == WARM_UP_STEPS:
                    forget_peaks()
                self.passed = 0
                self.started = time.perf_counter()

            def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
                self.passed += 1

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                wait()
                self.updating = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                wait()
                now = time.perf_counter()
                if not seconds:
                    measured.first_step_seconds = now - self.begun
                seconds.append(now - self.started)
                updates.append(now - self.updating)
                micro_steps.append(self.passed + 1)
                # Ranks agree: one that went on alone would wait for the others for ever.
                if ranks.any(enough()):
                    control.should_training_stop = True

        return StepClock()

    def _close(self, name: str) -> None:
        import torch

        self.phases.append(
            MeasuredPhase(
                name=name,
                allocated_bytes=torch.cuda.max_memory_allocated(),
                reserved_bytes=torch.cuda.max_memory_reserved(),
                process_bytes=self._driver_bytes() if self._driver_bytes is not None else None,
            )
        )
        self._forget_peaks()


def _tokenizer() -> Any:
    from launcher.training.build import load_tokenizer

    return load_tokenizer(str(PROFILES / "demo" / "model"), allow_download=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' progress and warnings off stdout and stderr for one run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
