"""estimate: a given setup's memory and speed on a GPU, as `vramwise estimate` answers it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from planner.base.json_codec import encode_text
from planner.base.values import dataclass
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.breakdown import Basis
from planner.models.catalog import Inspector, resolve_model
from planner.models.spec import ModelSpec
from planner.setup.card_limits import LIMITED_KNOBS, refuse_on_card
from planner.setup.cuda_allocator import planned_allocator
from planner.setup.methods import as_stored
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL, Stack
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate
from planner.throughput.roofline import forecast

ESTIMATE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One setup's figures, of one GPU but for the speed. `fits`: the upper end of the largest phase does."""

    setup: TrainingSetup
    memory: MemoryBreakdown
    speed: StepEstimate | None
    fits: bool

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of all processes together; None where no forecast is possible."""
        return None if self.speed is None else self.speed.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the contract of `vramwise estimate --json`."""
        return {
            "version": ESTIMATE_VERSION,
            "setup": self.setup.to_dict(),
            **self._figures(),
            "basis": _basis(self.memory.basis, None if self.speed is None else self.speed.basis),
        }

    def to_json(self) -> str:
        """The same as text; of a file of setups most have words in common, which are written once."""
        basis = _basis_text(self.memory.basis, None if self.speed is None else self.speed.basis)
        figures = encode_text(self._figures())[1:-1]
        return (
            f'{{"version": {ESTIMATE_VERSION}, "setup": {self.setup.to_json()}, {figures}, "basis": {basis}}}'
        )

    def _figures(self) -> dict[str, Any]:
        memory = self.memory
        return {
            "weights_bytes": memory.weights_bytes,
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "process_bytes": memory.process_bytes,
            "process_upper_bytes": memory.process_upper_bytes,
            "components": {part.name: part.size_bytes for part in memory.components},
            "phases": {phase.name: phase.process_bytes for phase in memory.phases},
            "tokens_per_second": self.tokens_per_second,
            "fits": self.fits,
        }


class Estimator:
    """Estimates setups of any models on one GPU, trained with one stack; each model is looked up once.

    `inspector` and `allow_network` are those of planner.models.catalog.resolve_model.
    """

    def __init__(
        self,
        target: GpuTarget,
        *,
        allow_network: bool = False,
        inspector: Inspector | None = None,
        stack: Stack = TRL,
    ) -> None:
        self.target = target
        self.stack = stack
        self._allocator = stack.allocator or planned_allocator()
        self._allow_network = allow_network
        self._inspector = inspector
        self._models: dict[tuple[str, bool], ModelSpec] = {}

    def estimate(self, setup: TrainingSetup, *, replay: bool = True) -> Estimate:
        """Estimate one setup, with torch's allocator replayed or (500 times as fast) its reserve fitted.

        Raises:
            NotModelledError: a knob whose memory is not modelled.
            InputError: the model is unknown, or does not have what the setup asks of it; or the card cannot
                run a knob of it.
        """
        refuse_on_card({name: getattr(setup, name) for name in LIMITED_KNOBS}, self.target.spec)
        model = self._model(setup)
        setup = as_stored(setup, model)
        run = TrainingRun(setup=setup, model=model, stack=self.stack)
        memory = estimate_memory(run, gpu=self.target.spec, replay=replay, allocator=self._allocator)
        target = self.target if run.parallelism.is_single else self.target.of_all()
        return Estimate(
            setup=setup,
            memory=memory,
            speed=forecast(run, self.target.spec),
            fits=memory.fits(target.usable_bytes),
        )

    def _model(self, setup: TrainingSetup) -> ModelSpec:
        key = setup.model, setup.image_patches > 0
        found = self._models.get(key)
        if found is None:
            found = resolve_model(
                setup.model,
                allow_network=self._allow_network,
                inspector=self._inspector,
                images=setup.image_patches > 0,
            )
            self._models[key] = found
        return found


def estimate(
    setup: TrainingSetup | Mapping[str, Any],
    *,
    gpu: str | None = None,
    display: bool = False,
    replay: bool = True,
) -> Estimate:
    """Estimate one setup, given as such or in its JSON form, on a GPU (null: this machine's).

    With `replay` reserved memory is told by a replay of torch's allocator, else by a fit.

    Raises:
        InputError: setup, model or GPU are not usable, or a knob is not modelled.
    """
    wanted = setup if isinstance(setup, TrainingSetup) else TrainingSetup.from_dict(setup)
    return Estimator(resolve_gpu(gpu, display=display)).estimate(wanted, replay=replay)


def _basis(basis: Basis, speed: str | None) -> dict[str, Any]:
    return {
        "coefficients": basis.coefficients,
        "record_count": basis.record_count,
        "stack_versions": dict(basis.stack_versions),
        "reserve": basis.reserve,
        "measured": basis.measured,
        "notes": list(basis.notes),
        "speed": speed,
    }


@lru_cache(maxsize=256)
def _basis_text(basis: Basis, speed: str | None) -> str:
    return encode_text(_basis(basis, speed))
