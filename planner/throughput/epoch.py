"""Time that a dataset takes: seconds of an epoch for examples of many lengths, and useful tokens a second.

Batches padded to their longest example are of many lengths. Short ones wait for the host and long ones for
the GPU, so a step's time is taken at several lengths and averaged, not at the mean length. Packed batches are
all of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from planner.base.values import dataclass
from planner.data.batches import BatchLength, Lengths, padding
from planner.data.lengths import DatasetStats, Packing
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate

StepAt = Callable[[TrainingSetup], StepEstimate | None]
"""Forecast of a step with full sequences; None where there is none."""
_Seconds = tuple[float, float, float]
"""A time as forecast, at its shortest and at its longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochTime:
    """One pass over the data with a setup.

    `real_tokens` are the examples' own after truncation, `processed_tokens` those and the padding; `steps`
    are optimizer steps. `seconds_low` and `seconds_high` are the forecast's interval.
    """

    seconds: float
    seconds_low: float
    seconds_high: float
    steps: int
    real_tokens: int
    processed_tokens: int

    @property
    def useful_tokens_per_second(self) -> float:
        """The examples' own tokens a second, all GPUs together."""
        return self.real_tokens / self.seconds


class Examples:
    """A dataset to train on, and what batching it in each way comes to; each is computed once."""

    def __init__(self, stats: DatasetStats) -> None:
        self.stats = stats
        self._lengths: dict[int, Lengths] = {}
        self._packed: dict[int, Packing] = {}
        self._batches: dict[tuple[int, int, int | None], tuple[BatchLength, ...]] = {}

    @property
    def mixed(self) -> bool:
        """Whether examples differ in length."""
        return len(self.stats.lengths) > 1

    def lengths(self, max_length: int) -> Lengths:
        """Lengths after truncation."""
        found = self._lengths.get(max_length)
        if found is None:
            found = self._lengths[max_length] = Lengths(self.stats, max_length)
        return found

    def packed(self, max_length: int) -> Packing:
        """What packing comes to at a length."""
        found = self._packed.get(max_length)
        if found is None:
            found = self._packed[max_length] = self.stats.packing(max_length)
        return found

    def examples_per_row(self, setup: TrainingSetup) -> float:
        """Examples in a row of a batch: 1, or the mean of packed rows."""
        if not setup.packing:
            return 1.0
        return self.lengths(setup.max_length).examples / self.packed(setup.max_length).sequences

    def batches(self, setup: TrainingSetup) -> tuple[BatchLength, ...]:
        """Longest examples of a setup's padded batches."""
        size, length = setup.per_device_train_batch_size, setup.max_length
        grouped = setup.train_sampling_strategy == "group_by_length"
        step = size * setup.gradient_accumulation_steps if grouped else None
        found = self._batches.get((length, size, step))
        if found is None:
            lengths = self.lengths(length)
            found = lengths.random_batches(size) if step is None else lengths.grouped_batches(size, step)
            self._batches[length, size, step] = found
        return found

    def slowest_batches(self, setup: TrainingSetup) -> tuple[BatchLength, ...]:
        """The same of what several GPUs go through at a time: all wait for the longest of their batches."""
        if setup.num_processes == 1:
            return self.batches(setup)
        several = setup.per_device_train_batch_size * setup.num_processes
        grouped = setup.train_sampling_strategy == "group_by_length"
        # Neighbours in a group go to the GPUs (accelerate data_loader.py, BatchSamplerShard).
        step = setup.per_device_train_batch_size * setup.gradient_accumulation_steps
        lengths = self.lengths(setup.max_length)
        return lengths.grouped_batches(several, step) if grouped else lengths.random_batches(several)

    def processed_tokens(self, setup: TrainingSetup) -> int:
        """Tokens that an epoch pushes through the model, padding included."""
        if setup.packing:
            size = setup.per_device_train_batch_size * setup.num_processes
            return math.ceil(self.packed(setup.max_length).sequences / size) * size * setup.max_length
        return padding(self.lengths(setup.max_length), self.batches(setup)).processed_tokens

    def epoch(self, setup: TrainingSetup, speed: StepEstimate, step_at: StepAt) -> EpochTime | None:
        """Time of an epoch; `speed` is the setup's forecast with full sequences.

        None where a shorter batch has no forecast.
        """
        lengths = self.lengths(setup.max_length)
        accumulated = setup.gradient_accumulation_steps
        optimizer = speed.seconds_per_optimizer_step - accumulated * speed.seconds_per_micro_step
        size = setup.per_device_train_batch_size * setup.num_processes
        if setup.packing:
            packed = self.packed(setup.max_length)
            micro_steps = math.ceil(packed.sequences / size)
            micro: _Seconds | None = _with_interval(speed.seconds_per_micro_step, speed)
        else:
            micro_steps = math.ceil(lengths.examples / size)
            micro = _mean_seconds(setup, self.slowest_batches(setup), step_at)
        if micro is None:
            return None
        steps = math.ceil(micro_steps / accumulated)
        seconds, low, high = (
            micro_steps * of_micro + steps * of_optimizer
            for of_micro, of_optimizer in zip(micro, _with_interval(optimizer, speed), strict=True)
        )
        return EpochTime(
            seconds=seconds,
            seconds_low=low,
            seconds_high=high,
            steps=steps,
            real_tokens=lengths.tokens,
            processed_tokens=self.processed_tokens(setup),
        )


def _mean_seconds(setup: TrainingSetup, batches: tuple[BatchLength, ...], step_at: StepAt) -> _Seconds | None:
    """Mean time of a micro-step over batches of several lengths; short ones have the host's interval."""
    total = [0.0, 0.0, 0.0]
    for batch in batches:
        step = step_at(setup.replace(max_length=max(1, round(batch.longest))))
        if step is None:
            return None
        own = _with_interval(step.seconds_per_micro_step, step)
        total = [mean + batch.share * one for mean, one in zip(total, own, strict=True)]
    return total[0], total[1], total[2]


def _with_interval(seconds: float, step: StepEstimate) -> _Seconds:
    """A time, and what it is at the ends of a forecast's interval."""
    rate = step.tokens_per_second
    return seconds, seconds * rate / step.tokens_per_second_high, seconds * rate / step.tokens_per_second_low
