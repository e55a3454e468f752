"""Measures the forms of a workload: exact counts, peak memory, and times as ratios taken in turns."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from harness.suite.workload import Form, Workload, method_of
from sparsecore.measure import Timing, interleaved

__all__ = ["Effort", "measure", "peak_bytes"]

_SECOND = "harness: second call"

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Effort:
    """What to measure, and for how long.

    Attributes:
        counts: exact figures and peak memory.
        seconds: of timing a workload; 0 does not time it.
    """

    counts: bool = True
    seconds: float = 0.0


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of torch's memory that one call holds beyond what was held before it.

    On a GPU by its own counter, on a CPU from the allocations in the order in which they happened. What numpy and numba
    allocate is not seen.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        on_device = torch.cuda.max_memory_allocated() - before
        if on_device:
            return on_device
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to standard error otherwise
    # The profiler knows the size of what is freed only if it saw it allocated: the first of two calls is for that.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
        gc.collect()
        with record_function(_SECOND):
            run()
    assert found.profiler is not None
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = most = 0
    counting = False
    for event in events:
        if event.name() == _SECOND:
            counting, held, most = True, 0, 0
        elif event.name() == "[memory]" and counting:
            held += event.nbytes()
            most = max(most, held)
    return most


def measure(workload: Workload, effort: Effort) -> Figures:
    """{form: {metric: value}} of every form of a workload.

    Raises:
        Missing: see `Workload.check`.
    """
    workload.check()
    torch.manual_seed(0)
    forms = workload.build()
    figures: Figures = {name: {} for name in forms if name != "frozen" and not name.startswith("dense/")}
    if effort.counts:
        with _little_to_collect():
            for name in figures:
                figures[name] |= _counts(forms[name])
    if effort.seconds > 0:
        for name, times in _times(forms, effort.seconds, workload).items():
            figures[name] |= times
    for name in figures:
        figures[name] |= _shares(figures, name)
    return figures


@contextmanager
def _little_to_collect() -> Iterator[None]:
    """The collector looks at objects that are new alone: those of torch and numba's compiler are many."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _counts(form: Form) -> dict[str, float]:
    if form.counts is None:
        return {}
    if form.run is not None:
        form.run()  # gradients and optimizer state exist, kernels are compiled
    found = {name: float(value) for name, value in form.counts().items()}
    if "macs_forward" in found:
        found["macs"] = sum(value for name, value in found.items() if name.startswith("macs_"))
    peak = form.peak or form.run
    return found if peak is None else {**found, "peak_bytes": float(peak_bytes(peak))}


def _times(forms: Mapping[str, Form], seconds: float, workload: Workload) -> Figures:
    runs = {name: form.run for name, form in forms.items() if form.run is not None}
    if not runs:
        return {}
    if workload.device == "cpu":
        least = workload.samples
        timings = interleaved(runs, seconds=seconds, least=least, warm=int(least >= 5))
    else:
        timings = _on_device(runs, seconds, workload.device)
    rivals = [timing for name, timing in timings.items() if name.startswith("dense")]
    if rivals:
        timings["dense"] = min(rivals, key=lambda timing: timing.minimum)
    figures: Figures = {}
    for name, timing in timings.items():
        if name == "frozen" or name.startswith("dense/"):
            continue
        figures[name] = {"seconds": timing.minimum, "noise": timing.median / timing.minimum - 1}
        if "frozen" in timings:
            figures[name]["time_vs_frozen"] = timing.minimum / timings["frozen"].minimum
    return figures


def _on_device(runs: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, Timing]:
    from harness.gpu_worker import time_calls

    for run in runs.values():
        run()
    calls = {name: partial(lambda run, turn: run(), run) for name, run in runs.items()}
    return time_calls(calls, device, samples=100, seconds=seconds)


_SHARES = {
    "macs_vs_dense": "macs",
    "bytes_vs_dense": "resident_bytes",
    "peak_vs_dense": "peak_bytes",
    "time_vs_dense": "seconds",
}


def _shares(figures: Figures, name: str) -> dict[str, float]:
    """What a form takes of the dense form, and of masked dense of the same density."""
    own, found = figures[name], {}
    dense, masked = figures.get("dense", {}), figures.get(name.replace(method_of(name), "masked", 1), {})
    for share, metric in _SHARES.items():
        if name != "dense" and metric in own and dense.get(metric):
            found[share] = own[metric] / dense[metric]
    if method_of(name) not in ("dense", "masked") and masked.get("seconds"):
        found["time_vs_masked"] = own["seconds"] / masked["seconds"]
    if name != "dense" and "quality_loss" in own and "quality_loss" in dense:
        found["quality_gap"] = 1 - (1 - own["quality_loss"]) / (1 - dense["quality_loss"])
    return found
