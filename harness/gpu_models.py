"""Models that train on a device, dense, masked and sparse, each a `Training`: one update at a time.

Models are built on the device. The recommenders' trainer and `harness.bpr` draw batches on the CPU; here they are there
before the clock starts, so that what is timed is the step. MultVAE's noise is part of it: the CPU draws it, or in a
graph the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from recsys.data.synthetic import synthetic
from recsys.models.base import Interactions, Recommender
from recsys.models.devices import moved
from recsys.models.lightgcn import LightGCN
from recsys.models.losses import multinomial_nll
from recsys.models.multvae import MultVAE
from recsys.models.neumf import NeuMF

__all__ = ["Training", "bpr", "decoder", "lightgcn", "multvae", "neumf", "table"]

_INTERVAL = 100  # steps between explorations
_BATCHES = 4

Batches = Callable[[int], Any]


class Training:
    """Steps of one model on batches that are there already.

    Args:
        model: on the device.
        loss: of batch number i.
        optimizer: holds the parameters.
        masked: density of masks to simulate, if any.
        explores: whether sparse modules have an explorer, one that keeps no history: that is for a report.
    """

    graphs: list[torch.cuda.CUDAGraph] | None = None

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
                model, optimizer, interval=_INTERVAL, total_steps=10**9, track_ever_active=False
            )

    def step(self, i: int) -> None:
        """One update without exploration."""
        if self.graphs is not None:
            self.graphs[i % _BATCHES].replay()
        else:
            self._update(i, 0)

    def capture(self) -> None:
        """From now on a step is the replay of a CUDA graph, one for each batch, and nothing explores.

        Off CUDA nothing changes.
        """
        if next(self.model.parameters()).device.type != "cuda":
            return
        self.explorer = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch wants it: what is made at first uses is there before
            for i in range(_BATCHES):
                self.step(i)
        torch.cuda.current_stream().wait_stream(side)
        graphs: list[torch.cuda.CUDAGraph] = []
        for i in range(_BATCHES):
            self.optimizer.zero_grad()  # the gradients are the graph's own
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                self._update(i, 0)
            graphs.append(graph)
        self.graphs = graphs

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
def _dataset(users: int, items: int, interactions: int) -> Any:
    return synthetic(users, items, interactions, seed=0)


def _adam(model: nn.Module, captured: bool = False) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), fused=True, capturable=captured)


def multvae(
    form: str,
    density: float,
    device: str,
    data: tuple[int, int, int],
    batch: int,
    widths: tuple[int, int],
    captured: bool = False,
) -> Training:
    """MultVAE without dropout, whose random numbers it draws on the CPU."""
    history, items = _dataset(*data).train, data[1]

    def draw(i: int) -> Interactions:
        rows = Interactions.from_scipy(history[i * batch : (i + 1) * batch])
        return Interactions(rows.items.to(device), rows.pointers.to(device))

    batches = _drawn(draw)
    stored = density if form == "sparse" else 1.0
    generator = torch.Generator().manual_seed(0)
    model = MultVAE(items, *widths, dropout=0.0, density=stored, generator=generator).to(device).train()
    masked = density if form == "masked" else None
    return Training(model, lambda i: model.loss(batches(i), 0), _adam(model, captured), masked)


def bpr(
    form: str, density: float, device: str, rows: int, dim: int, batch: int, captured: bool = False
) -> Training:
    """The workload of `harness.bpr`. In a graph sparse and dense update everything: it cannot wait for a number."""
    table: nn.Embedding | sparsecore.SparseEmbedding
    if form == "sparse":
        table = sparsecore.SparseEmbedding(rows, dim, density=density, sparse=not captured, device=device)
    else:
        table = nn.Embedding(rows, dim, sparse=form == "dense lazy", device=device)
    nn.init.normal_(sparsecore.weight_parameter(table), std=0.1)
    optimizer: torch.optim.Optimizer
    if form == "sparse" and not captured:
        optimizer = sparsecore.optim.Adam(table.parameters())
    elif form == "dense lazy":
        optimizer = torch.optim.SparseAdam(table.parameters())
    else:
        optimizer = _adam(table, captured)
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


def lightgcn(
    form: str, density: float, device: str, data: tuple[int, int, int], batch: int, dim: int, hops: int
) -> Training:
    """LightGCN on triples; dense and masked propagate by our kernels too, which are no slower than torch.sparse's."""
    make = functools.partial(LightGCN, _dataset(*data).train, dim, hops)
    return _recommender(make, form, density, device, data, batch)


def neumf(
    form: str,
    density: float,
    device: str,
    data: tuple[int, int, int],
    batch: int,
    factors: int,
    layers: tuple[int, ...],
) -> Training:
    """NeuMF, its tables and matrices all sparse, on interactions with four negatives each."""
    make = functools.partial(NeuMF, data[:2], factors, layers)
    return _recommender(make, form, density, device, data, batch)


def _recommender(
    make: Callable[..., Recommender],
    form: str,
    density: float,
    device: str,
    data: tuple[int, int, int],
    batch: int,
) -> Training:
    """The model as `recsys` trains it, on batches that its own sampler drew."""
    model = make(density=density if form == "sparse" else 1.0, generator=torch.Generator().manual_seed(0))
    model.tune()
    model = model.to(device).train()
    drawn = model.batches(_dataset(*data), batch, torch.Generator().manual_seed(1))
    first = [moved(each, torch.device(device)) for each in itertools.islice(drawn, _BATCHES)]
    masked = density if form == "masked" else None
    return Training(model, lambda i: model.loss(first[i % _BATCHES], 0), _adam(model), masked)


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
    return Training(
        model, lambda i: multinomial_nll(model(latent), interactions), _adam(model), explores=False
    )


def table(form: str, density: float, device: str, rows: int, dim: int, batch: int) -> Training:
    """A lookup table with gradients and Adam over all of it, as in `harness.memory`."""
    module: nn.Module
    if form == "sparse":
        module = sparsecore.SparseEmbedding(rows, dim, density=density, device=device)
    else:
        module = nn.Embedding(rows, dim, device=device)
    ids = _drawn(lambda i: torch.randint(rows, (batch,), device=device))
    return Training(module, lambda i: module(ids(i)).square().sum(), _adam(module), explores=False)
