"""Comparison: what a plan predicted beside what a script measured, and what the script does otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.runs.report.facts import PhaseFigures
from planner.text.figures import gib, rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A setting, or a fact of the machine or of the data, that is not the plan's."""

    name: str
    planned: str
    here: str

    def __str__(self) -> str:
        return f"{self.name}: planned {self.planned}, here {self.here}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Peaks by phase, and tokens a second, predicted and measured; null where nothing was measured.

    `differences` are what is not as planned: the first thing to look at where a figure is off. Memory is
    comparable on a GPU alone.
    """

    memory: tuple[PhaseFigures, ...]
    predicted_tokens_per_second: float | None
    measured_tokens_per_second: float | None
    differences: tuple[Difference, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What a person reads, a line each."""
        return (*self._memory(), self._speed(), *self._differences())

    def _memory(self) -> Iterator[str]:
        shown = [figure for figure in self.memory if figure.measured_bytes is not None and figure.comparable]
        for one in shown:
            error = "" if one.error is None else f" ({one.error:+.1%})"
            yield (
                f"{one.phase}, {one.what}: predicted {gib(one.predicted_bytes)}, "
                f"measured {gib(one.measured_bytes or 0)}{error}"
            )
        if not shown:
            yield "memory: not measured without a GPU"

    def _speed(self) -> str:
        predicted = rate(self.predicted_tokens_per_second)
        return f"tokens/s: predicted {predicted}, measured {rate(self.measured_tokens_per_second)}"

    def _differences(self) -> Iterator[str]:
        if not self.differences:
            yield "nothing differs from the plan"
        for difference in self.differences:
            yield f"not as planned: {difference}"
