"""No tensor or array as large as rows x cols of a sparse weight is allocated, in a step or in an exploration.

Two instruments, since neither sees everything: torch's profiler reports the bytes of every allocation that torch makes,
also inside operators; ``tracemalloc`` does the same for numpy. (Scratch inside compiled kernels is seen by the peak
memory of the process, in test_memory.py.) Sizes are such that activations are small beside the weights.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from strategies import BACKENDS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sparsecore
from recsys.models.base import Interactions
from recsys.models.multvae import MultVAE

ROWS, COLS = 3000, 2500


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every torch allocation in ``run``, positive, frees negative, in order; numpy's peak goes last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        torch.empty(1)  # one event for certain
        tracemalloc.start()
        run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    assert events, "the profiler reported no allocation: it cannot prove anything"
    return [e.nbytes() for e in events] + [peak]


def test_the_instrument_sees_a_dense_copy() -> None:
    layer = sparsecore.SparseLinear(COLS, ROWS, density=0.02)
    assert max(allocations(lambda: layer.pattern.to_mask())) >= ROWS * COLS
    assert max(allocations(lambda: np.zeros((ROWS, COLS), dtype=bool))) >= ROWS * COLS
    assert max(allocations(lambda: layer.pattern.to_dense(layer.values))) >= 4 * ROWS * COLS


class Everything(nn.Module):
    def __init__(self, density: float) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = sparsecore.SparseEmbedding(ROWS, COLS, density=density, generator=g)
        self.bag = sparsecore.SparseEmbeddingBag(ROWS, COLS, density=density, generator=g)
        self.linear = sparsecore.SparseLinear(COLS, ROWS, density=density, generator=g)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.table(ids[:, 0]) + self.bag(ids)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_training_and_exploring(backend: str, grow: str) -> None:
    density = 0.02  # 150,000 of 7,500,000: an int64 array of nnz is 1.2 MB, a byte for every position 7.5 MB
    model = Everything(density)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    explorer = sparsecore.DynamicSparsity(
        model, optimizer, interval=2, drop_fraction=0.3, total_steps=10, grow=grow
    )
    ids = torch.randint(0, ROWS, (6, 4))
    reports = []

    def step() -> None:
        with sparsecore.backend(backend):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
            reports.append(explorer.step())

    step()  # makes the optimizer's state; compiles the kernels of a step
    step()  # compiles those of an exploration
    assert max(allocations(step)) < ROWS * COLS / 2  # training only
    assert max(allocations(step)) < ROWS * COLS  # bytes: not even a mask of one byte a position, exploring
    assert [r is not None for r in reports] == [False, True, False, True]
    assert all(r is None or r.grown - r.regrown > 100 for r in reports)


@pytest.mark.parametrize("backend", BACKENDS)
def test_multvae(backend: str) -> None:
    n_items, hidden = 4000, 500
    model = MultVAE(n_items, hidden=hidden, latent=310, density=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    explorer = sparsecore.DynamicSparsity(model, optimizer, interval=2, total_steps=10)
    smallest = min(m.shape[0] * m.shape[1] for m in explorer.modules.values())
    history = scipy.sparse.random_array((8, n_items), density=0.01, format="csr", rng=0)
    batch = Interactions.from_scipy(history)

    def step() -> None:
        with sparsecore.backend(backend):
            optimizer.zero_grad()
            model.loss(batch, 0).backward()
            optimizer.step()
            explorer.step()

    step()
    step()
    # Every allocation in bytes is below the *element count* of the largest weight, and no float32 copy of the
    # smallest exists either (activations of 8 x 4000 floats are smaller than both).
    largest = n_items * hidden
    for _ in range(3):
        sizes = allocations(step)
        assert max(sizes) < largest
        assert 4 * smallest not in sizes


@pytest.mark.parametrize("some", [True, False], ids=["some rows", "all rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lightgcn_keeps_few_hops(backend: str, some: bool) -> None:
    """Propagated embeddings are activations, dense by the model's definition: at most hops + 1 and a gradient live."""
    n_users, n_items, dim, hops = 3000, 3000, 64, 3
    matrix = scipy.sparse.random_array((n_users, n_items), density=0.001, format="csr", rng=0)
    graph = sparsecore.normalized_bipartite((matrix > 0).astype(np.float64))
    table = sparsecore.SparseEmbedding(n_users + n_items, dim, density=0.1)
    optimizer = torch.optim.Adam(table.parameters(), lr=1e-3, fused=True)
    explorer = sparsecore.DynamicSparsity(table, optimizer, interval=2, total_steps=10)
    rows = torch.randint(0, n_users + n_items, (64,))

    def chosen(*args: Any) -> Tensor:
        return sparsecore.propagate_mean(*args, rows) if some else sparsecore.propagate_mean(*args)[rows]

    def step() -> None:
        with sparsecore.backend(backend):
            optimizer.zero_grad()
            chosen(graph, table, hops).square().sum().backward()
            optimizer.step()
            explorer.step()

    step()
    step()
    embeddings = 4 * (n_users + n_items) * dim
    for exploring in (True, False):
        sizes = allocations(step)[:-1]
        live = np.cumsum(sizes)
        assert max(sizes) <= embeddings
        limit = hops + 2
        assert live.max() <= limit * embeddings, (
            f"{live.max() / embeddings:.2f} at once, exploring: {exploring}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_score_topk_never_has_users_times_items(backend: str, encoding: str) -> None:
    queries, items, k = 512, 100_000, 20  # the torch backend has the scores of 8192 items at a time
    table = sparsecore.SparseEmbedding(items, 16, density=0.25, generator=torch.Generator().manual_seed(0))
    table.set_encoding(encoding)
    vectors = torch.randn(queries, 16)
    with sparsecore.backend(backend), torch.no_grad():
        sparsecore.score_topk(vectors, table, k)  # kernels, and what is made once
        largest = max(allocations(lambda: sparsecore.score_topk(vectors, table, k)))
    assert largest < queries * items
