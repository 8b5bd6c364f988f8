"""Candidate: one setup with its memory and speed on one card; Evaluator: makes and remembers candidates."""

from __future__ import annotations

from dataclasses import replace

from planner.base.errors import NotModelledError
from planner.base.values import dataclass
from planner.gpus.spec import GpuSpec
from planner.memory import MemoryBreakdown, estimate_memory, surely_exceeds
from planner.models.spec import ModelSpec
from planner.setup.card_limits import EIGHT_BIT, FLEX_CAPABILITY, TRITON
from planner.setup.run import Runs, TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate
from planner.throughput.epoch import EpochTime, Examples
from planner.throughput.roofline import forecast


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A setup, what it needs of one GPU, and how fast it is.

    `speed` is of full sequences, null without a forecast; `epoch` is of the data, null where that is unknown.
    """

    setup: TrainingSetup
    memory: MemoryBreakdown
    speed: StepEstimate | None
    epoch: EpochTime | None = None

    @property
    def peak_upper_bytes(self) -> int:
        """What has to fit: the interval's upper end of the largest phase."""
        return self.memory.peak_upper_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Expected rate of all GPUs together; None where no forecast is possible.

        Of the data's own tokens where the data is known, else of full sequences.
        """
        if self.epoch is not None:
            return self.epoch.useful_tokens_per_second
        return None if self.speed is None else self.speed.tokens_per_second


class Evaluator:
    """Estimates setups of one model on one card, each once.

    `examples` are the data, where it is known: no batch is longer than its longest example, whatever
    max_length allows, unless that length is a guess. `padded` says that examples differ in length. `runs` are
    those of the model that are known already. `eight_bit` says that a search may choose 8-bit products.
    """

    def __init__(
        self,
        model: ModelSpec,
        gpu: GpuSpec,
        usable_bytes: int,
        *,
        padded: bool = False,
        examples: Examples | None = None,
        runs: Runs | None = None,
        eight_bit: bool = False,
    ) -> None:
        self.model = model
        self.gpu = gpu
        self.usable_bytes = usable_bytes
        self.eight_bit = eight_bit
        self.examples = examples
        self.padded = padded if examples is None else examples.mixed
        self._longest = None if examples is None or examples.stats.estimated else examples.stats.longest
        self.runs = Runs(model) if runs is None else runs
        self._known: dict[TrainingSetup, Candidate] = {}
        self._memories: dict[TrainingSetup, MemoryBreakdown] = {}
        self._replays: dict[TrainingSetup, MemoryBreakdown] = {}
        self._ended: set[TrainingSetup] = set()
        self._too_much: set[TrainingSetup] = set()
        self._confirmed: dict[TrainingSetup, Candidate] = {}

    def on(self, gpu: GpuSpec, *, held_bytes: int = 0) -> Evaluator:
        """The same model and data on another card, of which so many bytes are held by others."""
        usable = max(0, gpu.usable_bytes - held_bytes)
        return Evaluator(
            self.model,
            gpu,
            usable,
            padded=self.padded,
            examples=self.examples,
            runs=self.runs,
            eight_bit=self.eight_bit,
        )

    @property
    def compiles(self) -> bool:
        """Whether torch's compiler has a backend for the card (Triton: compute capability 7.0 and up)."""
        return self.gpu.compute_capability is not None and self.gpu.compute_capability >= TRITON

    @property
    def flexes_sinks(self) -> bool:
        """Whether the model's attention has sinks, which flex attention computes without a matrix of scores,
        and the card runs that.
        """
        capability = self.gpu.compute_capability
        has = any(layer.attention_sinks for layer in self.model.layers)
        return has and capability is not None and capability >= FLEX_CAPABILITY

    @property
    def multiplies_8bit(self) -> bool:
        """Whether the card multiplies 8-bit floats, and a search may have it do so."""
        return self.eight_bit and self.gpu.compute_capability >= EIGHT_BIT

    def evaluate(self, setup: TrainingSetup) -> Candidate:
        """Estimate memory and speed of a setup, what the allocator reserves by its fit.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
            InputError: the setup asks of the model what it does not have.
        """
        found = self._known.get(setup)
        if found is None:
            memory, speed = self.fitted(setup), self._step(setup)
            found = self._known[setup] = Candidate(
                setup=setup, memory=memory, speed=speed, epoch=self._epoch(setup, speed)
            )
        return found

    def setup_fits(self, setup: TrainingSetup) -> bool:
        """Whether a setup fits by the fitted estimate; its speed is not asked for.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
        """
        return self.fitted(setup).fits(self.usable_bytes)

    def confirm(self, setup: TrainingSetup, *, whole: bool = False) -> Candidate:
        """The same with the allocator replayed: the figures that decide, at a hundred times the time.

        A replay ends as soon as it has shown that the setup does not fit, unless it is to be `whole`.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
            InputError: the setup asks of the model what it does not have.
        """
        memory = self.replayed(setup, whole=whole)
        found = self._confirmed.get(setup)
        if found is None or found.memory is not memory:
            found = self._confirmed[setup] = replace(self.evaluate(setup), memory=memory)
        return found

    def replayed(self, setup: TrainingSetup, *, whole: bool = False) -> MemoryBreakdown:
        """Memory by the allocator's replay, which is the same however examples are drawn; `whole` as in
        `confirm`.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
            InputError: the setup asks of the model what it does not have.
        """
        key = _ungrouped(setup)
        found = self._replays.get(key)
        if found is None or (whole and key not in self._ended and not found.fits(self.usable_bytes)):
            found = self._replays[key] = self._memory(key, replay=True, whole=whole)
            if whole:
                self._ended.add(key)
        return found

    def fitted(self, setup: TrainingSetup) -> MemoryBreakdown:
        """Memory alone, by the fitted estimate, which is the same however examples are drawn.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
        """
        key = _ungrouped(setup)
        found = self._memories.get(key)
        if found is None:
            found = self._memories[key] = self._memory(key, replay=False)
        return found

    def try_fitted(self, setup: TrainingSetup) -> MemoryBreakdown | None:
        """Memory by the fitted estimate; None where one of the setup's knobs is not modelled."""
        try:
            return self.fitted(setup)
        except NotModelledError:
            return None

    def _step(self, setup: TrainingSetup) -> StepEstimate | None:
        return forecast(self.run(setup), self.gpu)

    def _epoch(self, setup: TrainingSetup, speed: StepEstimate | None) -> EpochTime | None:
        if self.examples is None or speed is None:
            return None
        return self.examples.epoch(setup, speed, self._step)

    def _memory(self, setup: TrainingSetup, *, replay: bool, whole: bool = False) -> MemoryBreakdown:
        return estimate_memory(
            self.runs.of(self._as_batched(setup), padded=self._padded(setup)),
            gpu=self.gpu,
            replay=replay,
            allocator=self.runs.stack.allocator,
            limit_bytes=None if whole else self.usable_bytes,
        )

    def _surely_exceeds(self, setup: TrainingSetup) -> bool:
        """Whether the allocator's replay shows early that a setup does not fit; remembered if it does."""
        found = setup in self._too_much
        if not found:
            found = surely_exceeds(
                self.runs.of(self._as_batched(setup), padded=self._padded(setup)),
                gpu=self.gpu,
                usable_bytes=self.usable_bytes,
                allocator=self.runs.stack.allocator,
            )
            if found:
                self._too_much.add(setup)
        return found

    def run(self, setup: TrainingSetup) -> TrainingRun:
        """A setup's run with the data's batches."""
        return self.runs.of(setup, padded=self._padded(setup))

    def _padded(self, setup: TrainingSetup) -> bool:
        return self.padded and setup.per_device_train_batch_size > 1 and not setup.packing

    def _as_batched(self, setup: TrainingSetup) -> TrainingSetup:
        """The setup at the length of its longest batch."""
        if self._longest is None or setup.packing or setup.max_length <= self._longest:
            return setup
        return setup.replace(max_length=self._longest)

    def try_evaluate(self, setup: TrainingSetup) -> Candidate | None:
        """Estimate a setup that nobody asked for; None when one of its knobs is not modelled."""
        try:
            return self.evaluate(setup)
        except NotModelledError:
            return None

    def fits(self, candidate: Candidate) -> bool:
        """Whether the upper end of every phase is within what the card leaves."""
        return candidate.memory.fits(self.usable_bytes)

    def decide(self, setup: TrainingSetup, *, whole: bool = False) -> bool:
        """Whether a setup fits: by the fitted estimate where that is clear, else by the allocator's replay,
        `whole` as in `confirm`.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
            InputError: the setup asks of the model what it does not have.
        """
        if self.fitted(setup).peak_lower_bytes > self.usable_bytes:
            return False
        return self.fits_replayed(setup, whole=whole)

    def fits_replayed(self, setup: TrainingSetup, *, whole: bool = False) -> bool:
        """Whether a setup fits by the allocator's replay, `whole` as in `confirm`.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
            InputError: the setup asks of the model what it does not have.
        """
        key = _ungrouped(setup)
        if not whole and key not in self._replays and self._surely_exceeds(key):
            return False
        return self.replayed(key, whole=whole).fits(self.usable_bytes)

    def may_fit(self, candidate: Candidate) -> bool:
        """Whether the interval's lower end is within what the card leaves."""
        return candidate.memory.peak_lower_bytes <= self.usable_bytes


def _ungrouped(setup: TrainingSetup) -> TrainingSetup:
    if setup.train_sampling_strategy == "random":
        return setup
    return setup.replace(train_sampling_strategy="random")
