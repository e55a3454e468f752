"""When to explore, and how much to exchange: the drop fraction as a function of the step."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from sparsecore.errors import TopologyError

__all__ = ["SCHEDULES", "Schedule", "Timetable", "make_schedule"]

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
    return partial(_drop_fraction, name, start, end, total_steps)


def _drop_fraction(name: str, start: float, end: float, total_steps: int, step: int) -> float:
    return end + (start - end) * SCHEDULES[name](min(1.0, step / total_steps))


class Timetable:
    """The settings of explorations in time. Shared with the masked-dense reference."""

    def __init__(
        self, interval: int | None, drop_fraction: float, total_steps: int | None,
        end_drop_fraction: float, schedule: str, stop_fraction: float, grow: str,
    ) -> None:  # fmt: skip
        if interval is not None and (not isinstance(interval, numbers.Integral) or interval < 1):
            raise TopologyError(
                f"interval must be a positive whole number of steps or None, got {interval!r}"
            )
        if interval is not None and total_steps is None:
            raise TopologyError("total_steps is needed: the drop fraction falls over the whole run")
        if grow not in ("gradient", "random"):
            raise TopologyError(f"grow must be 'gradient' or 'random', got {grow!r}")
        # Plain numbers, whatever a sweep took them from: a checkpoint holds them.
        interval = None if interval is None else int(interval)
        try:
            drop_fraction, end_drop_fraction = float(drop_fraction), float(end_drop_fraction)
        except TypeError:
            raise TopologyError(
                f"drop_fraction and end_drop_fraction must be numbers, got {drop_fraction!r} and {end_drop_fraction!r}"
            ) from None
        try:
            stop_fraction = float(stop_fraction)
        except TypeError:
            raise TopologyError(f"stop_fraction must be a number, got {stop_fraction!r}") from None
        if not 0.0 <= stop_fraction <= 1.0:
            raise TopologyError(f"stop_fraction must be in [0, 1], got {stop_fraction!r}")
        total_steps = None if total_steps is None else int(total_steps)
        self.interval, self.grow = interval, grow
        self.total_steps = 1 if total_steps is None else total_steps
        self.last_step = math.floor(stop_fraction * self.total_steps + 1e-6)
        self.drop_fraction = make_schedule(schedule, drop_fraction, end_drop_fraction, self.total_steps)
        self._settings: dict[str, Any] = {
            "interval": interval, "drop_fraction": drop_fraction, "total_steps": total_steps,
            "end_drop_fraction": end_drop_fraction, "schedule": schedule, "stop_fraction": stop_fraction,
            "grow": grow,
        }  # fmt: skip

    def warn_if_idle(self) -> None:
        """Tell who builds an explorer that it will never explore, if the run is too short for that."""
        if self.interval is not None and self.interval > self.total_steps:
            warnings.warn(
                f"nothing will be explored: interval is {self.interval}, and the run has {self.total_steps} steps",
                stacklevel=3,
            )

    def due(self, step: int) -> bool:
        """Whether the step with this number (the first is 1) ends with an exploration."""
        return self.interval is not None and step % self.interval == 0 and step <= self.last_step

    def to_come(self, steps: int) -> bool:
        """Whether any exploration is due after this many steps."""
        return self.interval is not None and (steps // self.interval + 1) * self.interval <= self.last_step

    def settings(self) -> dict[str, Any]:
        """The settings, for a checkpoint."""
        return dict(self._settings)

    def expect(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings."""
        for key, value in self._settings.items():
            if saved.get(key) != value:
                raise TopologyError(
                    f"the saved explorer has {key}={saved.get(key)!r}, this one {key}={value!r}; "
                    "build it with the saved settings"
                )
