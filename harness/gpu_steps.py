"""Training steps on a device, dense, masked and sparse: time, host waits, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import sparsecore
from harness.gpu_models import Training, bpr, decoder, lightgcn, multvae, neumf, table
from harness.gpu_operands import DENSITIES, forget_weights
from harness.gpu_worker import Job, Row, describe_error, time_calls, watch

__all__ = ["FURTHER_WORKLOADS", "MEMORY", "WORKLOADS", "Workload", "measure"]


@dataclass(frozen=True)
class Workload:
    """A training step in several forms: ``build(form, density, device, **size)`` makes one of them.

    Attributes:
        forms: by name and density; names that begin with "dense" are dense forms.
        timed: whether its time is of interest, or its memory alone.
        captured: a step is the replay of a CUDA graph.
        limit: GiB of the device that may be used, as if it had no more.
    """

    build: Callable[..., Training]
    size: Mapping[str, Any]
    quick: Mapping[str, Any]
    forms: tuple[tuple[str, float], ...]
    timed: bool = True
    captured: bool = False
    limit: float | None = None


_DENSE, _LAZY = ("dense", 1.0), ("dense lazy", 1.0)
_SPARSE = tuple(("sparse", density) for density in DENSITIES)
_MASKED = tuple(("masked", density) for density in DENSITIES[:3])

_CAPTURED = ", CUDA graphs"
_TARGET = 1.15  # memory of a sparse form against dense, as a multiple of the density

WORKLOADS: dict[str, Workload] = {
    f"MultVAE, 20,000 items (synthetic), batch {batch}{suffix}": Workload(
        multvae,
        {"data": (2500, 20_000, 250_000), "batch": batch, "widths": (600, 200)},
        {"data": (60, 40, 600), "batch": 8, "widths": (16, 6)},
        (_DENSE, *_SPARSE[:3]) if suffix else (_DENSE, *_MASKED, *_SPARSE[:3]),
        captured=bool(suffix),
    )
    for batch in (500, 16)
    for suffix in ("", _CAPTURED)
} | {
    f"BPR-MF, 1,000,000 x 64, 2048 triples{suffix}": Workload(
        bpr,
        {"rows": 1_000_000, "dim": 64, "batch": 2048},
        {"rows": 200, "dim": 8, "batch": 6},
        (_DENSE, *_SPARSE[:3]) if suffix else (_DENSE, _LAZY, *_MASKED, *_SPARSE[:3]),
        captured=bool(suffix),
    )
    for suffix in ("", _CAPTURED)
}
MEMORY: dict[str, Workload] = {
    "SparseEmbedding 2,000,000 x 64, Adam": Workload(
        table,
        {"rows": 2_000_000, "dim": 64, "batch": 4096},
        {"rows": 200, "dim": 64, "batch": 6},
        (_DENSE, *_SPARSE),
        timed=False,
    ),
} | {
    f"MultVAE decoder, 1,000,000 items, 600 wide, batch 64{suffix}": Workload(
        decoder,
        {"items": 1_000_000, "hidden": 600, "batch": 64},
        {"items": 200, "hidden": 16, "batch": 6},
        (("sparse", 0.05), _DENSE),
        limit=limit,
    )
    for suffix, limit in (("", None), (", on 8 GiB", 8.0))
}
FURTHER_WORKLOADS: dict[str, Workload] = {
    "LightGCN, 20,000 users, 20,000 items (synthetic), d = 64, 3 hops, 2048 triples": Workload(
        lightgcn,
        {"data": (20_000, 20_000, 800_000), "batch": 2048, "dim": 64, "hops": 3},
        {"data": (60, 40, 600), "batch": 8, "dim": 8, "hops": 2},
        (_DENSE, *_MASKED, *_SPARSE[:3]),
    ),
    "NeuMF, 20,000 users, 20,000 items (synthetic), 64 factors, 2048 x 5 pairs": Workload(
        neumf,
        {"data": (20_000, 20_000, 800_000), "batch": 2048, "factors": 64, "layers": (512, 256, 128, 64)},
        {"data": (60, 40, 600), "batch": 8, "factors": 8, "layers": (16, 8)},
        (_DENSE, *_MASKED, *_SPARSE[:3]),
    ),
}


class _Meter:
    """Bytes on the device since it was made. Off CUDA nothing is counted."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.base = self._allocated()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def resident(self) -> int:
        return self._allocated() - self.base

    def peak(self, run: Callable[[], object]) -> int:
        """The highest during a call."""
        if not self.cuda:
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.base


@contextmanager
def _limited(gib: float | None, device: str) -> Iterator[None]:
    """What torch may take of a GPU; off CUDA there is no limit."""
    if gib is None or torch.device(device).type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    share = gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _begin(workload: Workload, form: str, density: float, device: str, quick: bool) -> tuple[Training, Row]:
    """A form after some steps, and what it takes. The bytes of forms before it do not count."""
    gc.collect()  # hooks make cycles: a form that is no longer wanted may still be there
    size, meter = (workload.quick if quick else workload.size), _Meter(device)
    captured = {"captured": True} if workload.captured else {}
    training = workload.build(form, density, device, **size, **captured)
    if workload.captured:
        training.capture()
    for i in range(2):
        training.step(i)
    row: Row = {"peak": meter.peak(lambda: training.step(2))}
    seen = watch(lambda: training.step(3), device)
    row |= {"syncs": seen.syncs, "sync places": seen.places}
    with torch.no_grad():
        loss = float(training.loss(0))
    if not torch.isfinite(torch.tensor(loss)):
        raise ArithmeticError(f"the loss is {loss} after four steps")
    if workload.captured:  # what a graph uses in between is its own, and in no count
        return training, {"syncs": row["syncs"], "sync places": seen.places}
    row["resident"] = meter.resident()
    return training, row | {"counted": _counted(training)}


def _counted(training: Training) -> int:
    extra = 0
    for parameter in training.model.parameters():
        grad = parameter.grad
        if grad is not None and grad.layout is torch.sparse_coo:  # has no storage that could be counted
            parts = grad.detach()._indices(), grad.detach()._values()
            extra += sum(t.numel() * t.element_size() for t in parts)
            parameter.grad = None
    return extra + sparsecore.resident_bytes(training.model, training.optimizer, training.explorer).total


def measure(job: Job, device: str, quick: bool) -> list[Row]:
    """One row for each form of a workload; one that fails says so, and the others go on.

    Returns:
        ``resident`` and ``peak`` bytes on the device, ``counted`` bytes of weights, gradients, optimizer state and
        indices, each with its ``.. ratio`` to the dense form that takes least; ``syncs``; and if the workload is timed
        ``ratio`` (fastest dense / form), ``ms``, ``exploration ms``.
    """
    forget_weights()
    workload = (WORKLOADS | MEMORY | FURTHER_WORKLOADS)[job.name]
    with _limited(workload.limit, device):
        return _measure(job, workload, device, quick)


def _measure(job: Job, workload: Workload, device: str, quick: bool) -> list[Row]:
    kept: dict[str, Training] = {}
    rows: dict[str, Row] = {}
    for form, density in workload.forms:
        name = form if form.startswith("dense") else f"{form}@{density:g}"
        rows[name] = {"name": job.name, "form": name, "density": density}
        try:
            if not quick:  # libraries take workspaces at their first call, which would count as this form's
                _begin(workload, form, density, device, quick=True)
            training, found = _begin(workload, form, density, device, quick)
        except Exception as error:
            rows[name]["error"] = describe_error(error)
            continue
        rows[name] |= found
        if workload.timed:
            kept[name] = training
        del training  # else it would still be there when the next one is built
    _compare_bytes(list(rows.values()))
    for row in rows.values():
        if row["form"].startswith("sparse") and not workload.captured:  # of a graph no memory is counted
            row["target"] = _TARGET * row["density"]
    try:
        _time(kept, rows, device, quick)
    except Exception as error:  # what was found before is kept
        rows["timing"] = {"name": job.name, "form": "timing", "density": None, "error": describe_error(error)}
    return list(rows.values())


def _compare_bytes(rows: list[Row]) -> None:
    for key in ("resident", "peak", "counted"):
        dense = [r[key] for r in rows if r["form"].startswith("dense") and r.get(key)]
        for row in rows:
            if dense and row.get(key):
                row[f"{key} ratio"] = row[key] / min(dense)


def _time(kept: dict[str, Training], rows: dict[str, Row], device: str, quick: bool) -> None:
    if not kept:
        return
    times = time_calls({name: t.step for name, t in kept.items()}, device, samples=1 if quick else 30)
    dense = [times[name] for name in times if name.startswith("dense")]
    for name, found in times.items():
        rows[name] |= {"ms": 1e3 * found.minimum, "median ms": 1e3 * found.median, "samples": found.samples}
        if dense:
            rows[name]["ratio"] = min(t.minimum for t in dense) / found.minimum
            rows[name]["median ratio"] = min(t.median for t in dense) / found.median
    for name, training in kept.items():
        if training.explorer is not None:
            try:
                training.exploring_step(0)
                exploring = time_calls({name: training.exploring_step}, device, samples=1 if quick else 3)
                added = exploring[name].minimum - times[name].minimum
                rows[name]["exploration ms"] = max(0.0, 1e3 * added)
            except Exception as error:
                rows[name]["error"] = f"exploration: {describe_error(error)}"
