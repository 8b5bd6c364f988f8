"""A series of any length in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class CoalescedSeries:
    """Means over ever longer stretches of x: at most `capacity` points, however many are added."""

    capacity: int = 1024
    _stride: int = field(default=1, init=False)
    _points: list[tuple[float, float]] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False)
    _sum: float = field(default=0.0, init=False)
    _x: float = field(default=0.0, init=False)

    def add(self, x: float, y: float) -> None:
        """Append a point; one that is not finite is left out."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        self._count, self._sum, self._x = self._count + 1, self._sum + y, x
        if self._count < self._stride:
            return
        self._points.append((x, self._sum / self._count))
        self._count, self._sum = 0, 0.0
        if len(self._points) >= self.capacity:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(right[0], (left[1] + right[1]) / 2) for left, right in pairs]
            self._stride *= 2

    def drop_after(self, x: float) -> None:
        """Forget what lies beyond x; of a stretch of several points that reaches beyond it, all."""
        self._points = [point for point in self._points if point[0] <= x]
        if self._x > x:
            self._count, self._sum = 0, 0.0

    def points(self) -> tuple[tuple[float, float], ...]:
        """The points so far, the last stretch included though it is not full."""
        rest = ((self._x, self._sum / self._count),) if self._count else ()
        return (*self._points, *rest)
