"""Training steps on a device, dense, masked and sparse: time, host waits, memory.

Models are built on the device. The recommenders' trainer and `harness.bpr` draw batches and noise on the CPU; here both
are there before the clock starts, so that what is timed is the step.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from harness.gpu_operands import DENSITIES, forget_weights
from harness.gpu_worker import Job, Row, describe_error, time_calls, watch
from recsys.data import load
from recsys.models.base import Interactions
from recsys.models.losses import multinomial_nll
from recsys.models.multvae import MultVAE

__all__ = ["MEMORY", "WORKLOADS", "Training", "Workload", "measure"]

_INTERVAL = 100  # steps between explorations
_BATCHES = 4

Batches = Callable[[int], Any]
Build = Callable[..., "Training"]


class Training:
    """Steps of one model on batches that are there already.

    Args:
        model: on the device.
        loss: of batch number i.
        optimizer: holds the parameters.
        masked: density of masks to simulate, if any.
        explores: whether sparse modules have an explorer, with its bits of history.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[int], Tensor],
        optimizer: torch.optim.Optimizer,
        masked: float | None = None,
        explores: bool = True,
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.explorer: sparsecore.DynamicSparsity | sparsecore.MaskedSparsity | None = None
        sparse = [m for m in model.modules() if isinstance(m, sparsecore.SparseModule)]
        for module in sparse:
            if module.values.device.type == "cpu":
                module.set_encoding("csr")  # what the torch backend reads as it is
        if masked is not None:
            self.explorer = sparsecore.MaskedSparsity(
                model, optimizer, density=masked, interval=_INTERVAL, total_steps=10**9
            )
        elif sparse and explores:
            self.explorer = sparsecore.DynamicSparsity(
                model, optimizer, interval=_INTERVAL, total_steps=10**9
            )

    def step(self, i: int) -> None:
        """One update without exploration."""
        self._update(i, 0)

    def exploring_step(self, i: int) -> None:
        """One update that ends with an exploration."""
        self._update(i, _INTERVAL - 1)

    def _update(self, i: int, steps: int) -> None:
        if self.explorer is not None:
            self.explorer.rewind(steps)
        self.optimizer.zero_grad()
        self.loss(i).backward()
        self.optimizer.step()
        if self.explorer is not None:
            self.explorer.step()


def _drawn(draw: Callable[[int], Any]) -> Batches:
    batches = [draw(i) for i in range(_BATCHES)]
    return lambda i: batches[i % _BATCHES]


@functools.cache
def _history(users: int, items: int, interactions: int) -> Any:
    options = {"users": users, "items": items, "interactions": interactions}
    return load("synthetic", data_dir=None, seed=0, **options).train


def multvae(
    form: str, density: float, device: str, data: tuple[int, int, int], batch: int, widths: tuple[int, int]
) -> Training:
    """MultVAE without dropout, whose random numbers it draws on the CPU (as it does those of the latent variables)."""
    history, items = _history(*data), data[1]

    def draw(i: int) -> Interactions:
        rows = Interactions.from_scipy(history[i * batch : (i + 1) * batch])
        return Interactions(rows.items.to(device), rows.pointers.to(device))

    batches = _drawn(draw)
    stored = density if form == "sparse" else 1.0
    generator = torch.Generator().manual_seed(0)
    model = MultVAE(items, *widths, dropout=0.0, density=stored, generator=generator).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    masked = density if form == "masked" else None
    return Training(model, lambda i: model.loss(batches(i), 0), optimizer, masked)


def bpr(form: str, density: float, device: str, rows: int, dim: int, batch: int) -> Training:
    """The workload of `harness.bpr`."""
    table: nn.Embedding | sparsecore.SparseEmbedding
    if form == "sparse":
        table = sparsecore.SparseEmbedding(rows, dim, density=density, sparse=True, device=device)
    else:
        table = nn.Embedding(rows, dim, sparse=form == "dense lazy", device=device)
    nn.init.normal_(sparsecore.weight_parameter(table), std=0.1)
    optimizer: torch.optim.Optimizer
    if form == "sparse":
        optimizer = sparsecore.optim.Adam(table.parameters())
    elif form == "dense lazy":
        optimizer = torch.optim.SparseAdam(table.parameters())
    else:
        optimizer = torch.optim.Adam(table.parameters(), fused=True)
    half = rows // 2
    users_of = _drawn(lambda i: torch.randint(half, (batch,), device=device))
    items_of = _drawn(lambda i: torch.randint(half, rows, (batch, 2), device=device))

    def loss(i: int) -> Tensor:
        users, items = users_of(i), items_of(i)
        if isinstance(table, sparsecore.SparseEmbedding):
            positive, negative = sparsecore.gather_dot(table, users, table, items).unbind(1)
        else:
            user, one, other = table(torch.cat((users, items[:, 0], items[:, 1]))).chunk(3)
            positive, negative = (user * one).sum(1), (user * other).sum(1)
        return F.softplus(negative - positive).mean()

    return Training(table, loss, optimizer, density if form == "masked" else None)


def decoder(form: str, density: float, device: str, items: int, hidden: int, batch: int) -> Training:
    """MultVAE's last two layers and its loss; the catalogue is large."""
    model = nn.Sequential(nn.Linear(200, hidden), nn.Tanh()).to(device)
    if form == "sparse":
        model.append(sparsecore.SparseLinear(hidden, items, density=density, device=device))
    else:
        model.append(nn.Linear(hidden, items, device=device))
    latent, each = torch.randn(batch, 200, device=device), min(100, items)
    chosen = torch.randint(items, (batch * each,), device=device)
    interactions = Interactions(chosen, torch.arange(batch + 1, device=device) * each)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    return Training(model, lambda i: multinomial_nll(model(latent), interactions), optimizer, explores=False)


def table(form: str, density: float, device: str, rows: int, dim: int, batch: int) -> Training:
    """A lookup table with gradients and Adam over all of it, as in `harness.memory`."""
    module: nn.Module
    if form == "sparse":
        module = sparsecore.SparseEmbedding(rows, dim, density=density, device=device)
    else:
        module = nn.Embedding(rows, dim, device=device)
    ids = _drawn(lambda i: torch.randint(rows, (batch,), device=device))
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    return Training(module, lambda i: module(ids(i)).square().sum(), optimizer, explores=False)


@dataclass(frozen=True)
class Workload:
    """A training step in several forms: ``build(form, density, device, **size)`` makes one of them.

    Attributes:
        forms: by name and density; names that begin with "dense" are dense forms.
        timed: whether its time is of interest, or its memory alone.
        target: memory against dense, as a multiple of the density.
    """

    build: Build
    size: Mapping[str, Any]
    quick: Mapping[str, Any]
    forms: tuple[tuple[str, float], ...]
    timed: bool = True
    target: float | None = None


_DENSE, _LAZY, _MASKED = ("dense", 1.0), ("dense lazy", 1.0), ("masked", 0.5)
_SPARSE = tuple(("sparse", density) for density in DENSITIES)

WORKLOADS: dict[str, Workload] = {
    f"MultVAE, 20,000 items (synthetic), batch {batch}": Workload(
        multvae,
        {"data": (2500, 20_000, 250_000), "batch": batch, "widths": (600, 200)},
        {"data": (60, 40, 600), "batch": 8, "widths": (16, 6)},
        (_DENSE, _MASKED, *_SPARSE[:3]),
    )
    for batch in (500, 16)
} | {
    "BPR-MF, 1,000,000 x 64, 2048 triples": Workload(
        bpr,
        {"rows": 1_000_000, "dim": 64, "batch": 2048},
        {"rows": 200, "dim": 8, "batch": 6},
        (_DENSE, _LAZY, _MASKED, *_SPARSE[:3]),
    )
}
MEMORY: dict[str, Workload] = {
    "SparseEmbedding 2,000,000 x 64, Adam": Workload(
        table,
        {"rows": 2_000_000, "dim": 64, "batch": 4096},
        {"rows": 200, "dim": 64, "batch": 6},
        (_DENSE, *_SPARSE),
        timed=False,
        target=1.15,
    ),
    "MultVAE decoder, 1,000,000 items, 600 wide, batch 64": Workload(
        decoder,
        {"items": 1_000_000, "hidden": 600, "batch": 64},
        {"items": 200, "hidden": 16, "batch": 6},
        (("sparse", 0.05), _DENSE),
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


def _begin(workload: Workload, form: str, density: float, device: str, quick: bool) -> tuple[Training, Row]:
    """A form after some steps, and what it takes. The bytes of forms before it do not count."""
    gc.collect()  # hooks make cycles: a form that is no longer wanted may still be there
    size, meter = (workload.quick if quick else workload.size), _Meter(device)
    training = workload.build(form, density, device, **size)
    for i in range(2):
        training.step(i)
    row: Row = {"peak": meter.peak(lambda: training.step(2))}
    seen = watch(lambda: training.step(3), device)
    row |= {"syncs": seen.syncs, "sync places": seen.places}
    with torch.no_grad():
        loss = float(training.loss(0))
    if not torch.isfinite(torch.tensor(loss)):
        raise ArithmeticError(f"the loss is {loss} after four steps")
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
    workload = (WORKLOADS | MEMORY)[job.name]
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
        if workload.target and row["form"] != "dense":
            row["target"] = workload.target * row["density"]
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
