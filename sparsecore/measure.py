"""Times that can be compared: the candidates in turn, in one process, the minimum of many short samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from sparsecore.errors import SparsecoreError

__all__ = ["Timing", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        minimum: fastest sample: what the code needs when nothing disturbs it.
        median: middle sample: what it took on this machine.
        samples: number of calls timed.
    """

    minimum: float
    median: float
    samples: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float = 2.0, least: int = 5, warm: int = 0
) -> dict[str, Timing]:
    """Time several functions against each other, in rotating order, without garbage collection.

    On a shared machine the speed drifts by tens of percent within minutes; alternating calls see the same drift, so
    that the *ratio* of two minima holds to a few percent where each alone does not. Quote ratios.

    Args:
        candidates: functions by name; each is called once before, to compile and to warm up.
        seconds: time to spend in all, at least.
        least: samples of each, at least.
        warm: calls before each timed one that are not timed. With 1 a candidate finds the caches as it left them, as in
            a loop of its own; with 0, as the one before it left them.

    Raises:
        SparsecoreError: without candidates.
    """
    if not candidates:
        raise SparsecoreError("nothing to time: give at least one function")
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for run in candidates.values():
        run()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start, turn = time.perf_counter(), 0
        while turn < least or time.perf_counter() - start < seconds:
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                for _ in range(warm):
                    candidates[name]()
                begin = time.perf_counter()
                candidates[name]()
                samples[name].append(time.perf_counter() - begin)
            turn += 1
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(min(times), median(times), len(times)) for name, times in samples.items()}
