"""The fit of what the allocator reserves beyond what it hands out, where it is not replayed."""

from __future__ import annotations

from collections.abc import Sequence


def non_negative_fit(
    terms: Sequence[Sequence[float]], reserve_bytes: Sequence[int], reserved_bytes: Sequence[int]
) -> list[float]:
    """Least squares of a constant and the terms on the reserve, each run weighted by its reserved memory.

    A reserve that shrinks with a larger layer has no meaning, so terms that come out negative are taken out,
    the most negative first, and the rest fitted again.
    """
    import numpy as np

    rows = np.array([(1.0, *row) for row in terms])
    target = np.array(reserve_bytes, dtype=float)
    weight = 1.0 / np.array(reserved_bytes, dtype=float)
    active = list(range(rows.shape[1]))
    solution = np.zeros(rows.shape[1])
    while active:
        found, *_ = np.linalg.lstsq(rows[:, active] * weight[:, None], target * weight, rcond=None)
        if found.min() >= 0:
            solution[active] = found
            break
        active.pop(int(found.argmin()))
    return [float(value) for value in solution]
