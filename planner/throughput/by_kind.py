"""Numbers by kind of work: how much of each there is, or a unit's seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from planner.base.errors import FieldError
from planner.base.values import dataclass
from planner.throughput.work_kinds import SIDES, WORK_KINDS, Per

_POSITIONS = {kind.name: at for at, kind in enumerate(WORK_KINDS)}
_POSITIONS_OF = {
    per: {kind.name: at for at, kind in enumerate(WORK_KINDS) if kind.per == per} for per in SIDES
}


def positions_of(*names: str) -> tuple[int, ...]:
    """Where kinds of work stand in the table.

    Raises:
        KeyError: there is none of a name.
    """
    return tuple(_POSITIONS[name] for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByKind(Mapping[str, float]):
    """A number for each kind of work, by the kind's name: how much of it there is, or a unit's seconds.

    `numbers` stand in the order of WORK_KINDS.
    """

    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.numbers) != len(WORK_KINDS):
            raise FieldError("numbers by kind of work", self.numbers, f"{len(WORK_KINDS)} numbers")

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> ByKind:
        """From a mapping with every kind.

        Raises:
            KeyError: it lacks one.
        """
        return cls(numbers=tuple(numbers[kind.name] for kind in WORK_KINDS))

    @classmethod
    def counted(cls, per: Per, **amounts: float) -> ByKind:
        """From counts of a pass, a micro-step or an optimizer step; nothing is done of kinds not named.

        Raises:
            FieldError: a name is no kind of work that is counted there.
        """
        found = [0.0] * len(WORK_KINDS)
        positions = _POSITIONS_OF[per]
        for name, amount in amounts.items():
            if name not in positions:
                raise FieldError(f"kind of work of a {per}", name, "one of " + ", ".join(positions))
            found[positions[name]] = amount
        return cls(numbers=tuple(found))

    def with_amounts(self, positions: tuple[int, ...], amounts: tuple[float, ...]) -> ByKind:
        """The same with other amounts at `positions_of` some kinds."""
        found = list(self.numbers)
        for at, amount in zip(positions, amounts, strict=True):
            found[at] = amount
        return ByKind(numbers=tuple(found))

    def plus(self, other: ByKind, count: float) -> ByKind:
        """These and so many times the others."""
        pairs = zip(self.numbers, other.numbers, strict=True)
        return ByKind(numbers=tuple(own + count * more for own, more in pairs))

    def __getitem__(self, name: str) -> float:
        return self.numbers[_POSITIONS[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(_POSITIONS)

    def __len__(self) -> int:
        return len(self.numbers)
