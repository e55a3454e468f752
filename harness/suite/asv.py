"""The workloads as asv benchmarks: every figure of every form is a number that asv tracks.

A bench file defines a class for a kind of workload: `setup_cache` measures all of them once, every ``track_*`` reads
one figure. Versions are set by hand, so that no edit of a docstring ends a series.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any, cast

from harness.suite import frozen
from harness.suite.measure import Effort, measure
from harness.suite.registry import WORKLOADS
from harness.suite.workload import METRICS, Missing

__all__ = ["GROUPS", "SMOKE", "Cache", "cells", "measured", "tracked"]

SMOKE = bool(os.environ.get("SPARSECORE_BENCH_QUICK"))  # everything once, nothing timed
_SECONDS = 0.5

Cache = dict[str, dict[str, Any]]


def cells(group: str, quick: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parameters of a class: workloads of a group, small ones or those of real shapes, and all of their forms."""
    works = [w for w in WORKLOADS.values() if w.group == group and w.quick == quick]
    return tuple(w.name for w in works), tuple(dict.fromkeys(form for w in works for form in w.forms))


def measured(names: tuple[str, ...]) -> Cache:
    """What `setup_cache` returns: of every workload its figures, or why there are none."""
    effort = Effort(counts=True, seconds=0.0 if SMOKE else _SECONDS)
    found: Cache = {}
    for name in names:
        try:
            found[name] = {"figures": measure(WORKLOADS[name], effort)}
        except Missing as missing:
            found[name] = {"missing": str(missing)}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found


def tracked(*metrics: str) -> Callable[[type], type]:
    """Class decorator: a ``track_METRIC(cache, workload, form)`` for each of the metrics.

    Not a number where a form does not have the figure; the error of a workload that failed.
    """

    def decorate(suite: type) -> type:
        for metric in metrics:
            setattr(suite, f"track_{metric}", _track(metric))
        return suite

    return decorate


def _track(metric: str) -> Callable[..., float]:
    def track(self: object, found: Cache, workload: str, form: str) -> float:
        if "error" in found[workload]:
            raise RuntimeError(found[workload]["error"])
        return found[workload].get("figures", {}).get(form, {}).get(metric, float("nan"))

    named = cast(Any, track)
    named.__name__ = f"track_{metric}"
    named.unit = METRICS[metric].unit
    named.version = _version(metric)
    return track


def _version(metric: str) -> str:
    """Of a series: the frozen kernels' version is part of that of times held against them."""
    return f"1-frozen{frozen.VERSION}" if metric == "time_vs_frozen" else "1"


_COUNTED = ("macs", "macs_vs_dense", "resident_bytes", "bytes_vs_dense", "peak_bytes", "peak_vs_dense")
_TIMED = ("time_vs_frozen", "time_vs_dense", "seconds", "noise")
_STEPS = ("macs_forward", "macs_backward", "state_bytes")
GROUPS: dict[str, tuple[str, ...]] = {
    "operation": (*_COUNTED, *_TIMED),
    "layer": (*_COUNTED, *_STEPS, *_TIMED),
    "train": (*_COUNTED, *_STEPS, "macs_exploration", *_TIMED, "time_vs_masked"),
    "infer": (*_COUNTED, *_TIMED),
    # Single seeds too: without them nobody can tell, from the history, whether a difference is noise.
    "quality": (
        "quality_loss",
        "quality_gap",
        *(name for name in METRICS if name.startswith("quality_loss_")),
    ),
    "device": (*_COUNTED, *_STEPS, *_TIMED, "time_vs_masked"),
    "other": ("file_bytes", "peak_bytes", "peak_vs_dense", *_TIMED),
}
