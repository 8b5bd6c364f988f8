"""MemoryBreakdown: what a setup needs, by phase and by component."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from planner.base import validate
from planner.base.errors import InputError
from planner.base.values import dataclass

PHASES = ("load", "step", "evaluation", "save")
REPLAYED = "allocator replayed"
FITTED = "reserve fitted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """Bytes of one kind at the peak of the largest phase.

    `name` is stable ("weights_4bit"), `title` what a person reads, `origin` where the figure comes from.
    """

    name: str
    title: str
    size_bytes: int
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseMemory:
    """Peak of one phase: allocated and reserved by torch's caching allocator, and what the driver shows.

    `peak_moment` says where inside the phase the peak lies ("backward of decoder layer 47").
    """

    name: str
    peak_moment: str
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    process_upper_bytes: int

    def __post_init__(self) -> None:
        validate.choice("phase", self.name, PHASES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """What the numbers rest on.

    `coefficients` names the calibration, `record_ids` the measured runs behind it, `stack_versions` the
    library versions they were measured with, `measured` whether a setup like this one was measured,
    `notes` how far this one lies from anything measured, and `reserve` how reserved memory was told.
    """

    coefficients: str
    record_count: int
    stack_versions: tuple[tuple[str, str], ...]
    measured: bool
    notes: tuple[str, ...] = ()
    reserve: str = FITTED


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBreakdown:
    """Memory of one GPU for one setup.

    `weights_bytes`: allocated after the model is loaded. `allocated_bytes` and `reserved_bytes`: peaks over
    training steps in steady state. `process_bytes`: what the driver shows at the end of those steps, less
    what it showed before the process started. `process_upper_bytes`: the interval's upper end.
    `peak_bytes` and `peak_upper_bytes` are those of the largest phase, on which fitting is decided.
    `components` are the parts of `process_bytes` and sum to it.

    Raises:
        InputError: the components do not sum to the total.
    """

    weights_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    process_upper_bytes: int
    components: tuple[Component, ...]
    phases: tuple[PhaseMemory, ...]
    basis: Basis

    def __post_init__(self) -> None:
        total = sum(component.size_bytes for component in self.components)
        if total != self.process_bytes:
            raise InputError(f"components sum to {total}, not to process_bytes {self.process_bytes}")

    @property
    def peak_phase(self) -> PhaseMemory:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.process_upper_bytes)

    @property
    def peak_bytes(self) -> int:
        """Expected bytes of the largest phase."""
        return max(phase.process_bytes for phase in self.phases)

    @property
    def peak_upper_bytes(self) -> int:
        """Upper end of the largest phase: what has to fit."""
        return max(phase.process_upper_bytes for phase in self.phases)

    @property
    def peak_lower_bytes(self) -> int:
        """As far below the expected bytes of the largest phase as the upper end is above them."""
        return 2 * self.peak_bytes - self.peak_upper_bytes

    def fits(self, usable_bytes: int) -> bool:
        """Whether the upper end of every phase is within the bytes a card leaves."""
        return self.peak_upper_bytes <= usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)
