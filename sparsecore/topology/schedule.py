"""Drop fraction as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from sparsecore.errors import TopologyError

__all__ = ["SCHEDULES", "Schedule", "make_schedule"]

Schedule = Callable[[float], float]
"""Progress in [0, 1] -> share of the way from the start value (1) to the end value (0)."""


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Schedule] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def make_schedule(name: str, start: float, end: float, total_steps: int) -> Callable[[int], float]:
    """``rho(t) = end + (start - end) * shape(t / total_steps)``: the fraction of a weight's nonzeros that is exchanged.

    ``"cosine"`` is the one of DSL (start 0.5, end 0.005, over the whole run) and of RigL (end 0).

    Args:
        name: ``"cosine"``, ``"linear"`` or ``"constant"`` (which ignores ``end``).
        start, end: drop fractions at step 0 and at ``total_steps``, in [0, 1].
        total_steps: length of the run; later steps keep the end value.

    Raises:
        TopologyError: for an unknown name, a fraction outside [0, 1], or ``total_steps < 1``.
    """
    if name not in SCHEDULES:
        raise TopologyError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    for label, value in (("drop_fraction", start), ("end_drop_fraction", end)):
        if not 0.0 <= value <= 1.0:
            raise TopologyError(f"{label} must be in [0, 1], got {value!r}")
    if total_steps < 1:
        raise TopologyError(f"total_steps must be at least 1, got {total_steps!r}")
    shape = SCHEDULES[name]
    return lambda step: end + (start - end) * shape(min(1.0, step / total_steps))
