"""Graphs and propagation against dense formulas."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BACKENDS, masks, seeds
from torch import Tensor, nn

import sparsecore
from sparsecore import (
    Graph,
    PatternError,
    SparsecoreError,
    SparseEmbedding,
    normalized_bipartite,
    propagate_mean,
)

pytestmark = pytest.mark.feature("graphs")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(symmetric: bool, nodes: int = 9) -> tuple[Graph, Tensor]:
    """A graph with an isolated node (4), a node with only outgoing edges (5), and its dense matrix."""
    rng = np.random.default_rng(3)
    a = rng.random((nodes, nodes)) * (rng.random((nodes, nodes)) < 0.4)
    a = a + a.T if symmetric else a
    a[4] = a[:, 4] = 0
    a[:, 5] = 0 if not symmetric else a[:, 5]
    return Graph.from_scipy(scipy.sparse.csr_array(a), torch.float64), torch.from_numpy(a)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@every_backend
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("d", [1, 10, 16, 50])
def test_graph_multiplies(backend: str, symmetric: bool, d: int) -> None:
    graph, a = make(symmetric)
    assert graph.symmetric is symmetric
    assert len(list(graph.buffers())) == (3 if symmetric else 6)
    x = torch.randn(9, d, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, d, dtype=torch.float64)
    with sparsecore.backend(backend):
        out = graph(x)
        close(out, a @ x)
        (grad,) = torch.autograd.grad((out * weights).sum(), x)
    close(grad, a.t() @ weights)


@every_backend
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_propagate_mean_dense_and_sparse_agree_with_the_formula(
    backend: str, symmetric: bool, hops: int
) -> None:
    graph, a = make(symmetric)
    sparse = SparseEmbedding(
        9, 17, density=0.3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    dense = sparse.to_dense()
    e = dense.weight.detach().clone().requires_grad_()
    expected = sum((torch.linalg.matrix_power(a, h) @ e for h in range(hops + 1)), torch.zeros_like(e)) / (
        hops + 1
    )
    weights = torch.randn(9, 17, dtype=torch.float64)
    (expected * weights).sum().backward()
    assert e.grad is not None
    with sparsecore.backend(backend):
        for table in (sparse, dense):
            out = propagate_mean(graph, table, hops)
            close(out, expected.detach())
            (out * weights).sum().backward()
    close(dense.weight.grad, e.grad)  # type: ignore[arg-type]
    close(sparse.values.grad, e.grad.view(-1)[sparse.pattern.positions()])  # type: ignore[arg-type]


@every_backend
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("ids", [[3, 0, 3, 4], [8, 5, 3, 3, 2, 1], []], ids=["few", "many", "none"])
def test_some_rows_of_the_mean_are_those_of_all(
    backend: str, symmetric: bool, hops: int, ids: list[int]
) -> None:
    graph, _ = make(symmetric)
    sparse = SparseEmbedding(
        9, 70, density=0.3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    rows = torch.tensor(ids, dtype=torch.int64)
    weights = torch.randn(len(ids), 70, dtype=torch.float64)
    with sparsecore.backend(backend):
        for table in (sparse, sparse.to_dense()):
            parameter = table.values if isinstance(table, SparseEmbedding) else table.weight
            all_rows, some = (
                propagate_mean(graph, table, hops)[rows],
                propagate_mean(graph, table, hops, rows),
            )
            close(some.detach(), all_rows.detach())
            expected, found = (
                torch.autograd.grad((out * weights).sum(), parameter) for out in (all_rows, some)
            )
            close(found[0], expected[0])


def test_growth_is_scored_by_some_rows_as_by_all() -> None:
    graph, _ = make(False)
    generator = torch.Generator().manual_seed(0)
    table = SparseEmbedding(9, 12, density=0.3, dtype=torch.float64, generator=generator)
    rows = torch.tensor([3, 0, 3, 8])
    weights = torch.randn(4, 12, dtype=torch.float64)
    grown = []
    for some in (True, False):
        model = copy.deepcopy(table)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        explorer = sparsecore.DynamicSparsity(model, optimizer, interval=1, total_steps=10)
        out = propagate_mean(graph, model, 3, rows) if some else propagate_mean(graph, model, 3)[rows]
        (out * weights).square().sum().backward()
        optimizer.step()
        assert explorer.step() is not None
        grown.append(model.pattern.positions())
    assert torch.equal(*grown)
    assert not torch.equal(grown[0], table.pattern.positions())


@given(masks(max_rows=7, widths=(1, 2, 7)), seeds, st.booleans())
def test_normalized_bipartite_equals_the_dense_formula(mask: Tensor, seed: int, weighted: bool) -> None:
    r = mask.to(torch.float64)
    if weighted:
        r = r * (
            torch.rand(r.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        )
    users, items = r.shape
    a = torch.zeros(users + items, users + items, dtype=torch.float64)
    a[:users, users:], a[users:, :users] = r, r.t()
    scale = a.sum(1).pow(-0.5)
    scale[a.sum(1) == 0] = 0
    graph = normalized_bipartite(scipy.sparse.csr_array(r.numpy()), torch.float64)
    assert graph.n_nodes == users + items
    assert graph.n_edges == 2 * int(mask.sum())
    assert graph.symmetric, (
        "rounding must not make the graph look asymmetric: its transpose would be stored too"
    )
    close(graph(torch.eye(users + items, dtype=torch.float64)), scale[:, None] * a * scale)


def test_isolated_nodes_keep_their_embedding_divided() -> None:
    matrix = scipy.sparse.csr_array(np.array([[1.0, 0, 0], [0, 0, 0]]))
    graph = normalized_bipartite(matrix, torch.float64)
    table = nn.Embedding(5, 2, dtype=torch.float64)
    out = propagate_mean(graph, table, 3)
    for node in (1, 3, 4):
        close(out[node], table.weight[node] / 4)
    close(out[0], (table.weight[0] * 2 + table.weight[2] * 2) / 4)


@every_backend
def test_a_graph_without_edges(backend: str) -> None:
    graph = normalized_bipartite(scipy.sparse.csr_array((2, 3)), torch.float64)
    assert graph.n_edges == 0
    table = SparseEmbedding(5, 4, density=0.5, dtype=torch.float64)
    with sparsecore.backend(backend):
        close(propagate_mean(graph, table, 2).detach() * 3, table.to_dense().weight.detach())


def test_source_matrix_is_neither_changed_nor_shared() -> None:
    matrix = scipy.sparse.csr_array(np.array([[0.0, 2.0], [2.0, 0.0]]))
    graph = Graph(matrix)
    bipartite = normalized_bipartite(matrix)
    matrix.data[:] = 9
    matrix.indices[:] = 0
    assert graph(torch.eye(2)).tolist() == [[0, 2], [2, 0]]
    assert bipartite(torch.eye(4)).sum().item() == pytest.approx(4)


@pytest.mark.parametrize("form", ["coo_array", "csc_array", "csr_matrix"])
def test_any_scipy_form_and_duplicates_add_up(form: str) -> None:
    coo = scipy.sparse.coo_array(([1.0, 2.0, 5.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    graph = Graph.from_scipy(getattr(scipy.sparse, form)(coo))
    assert graph(torch.eye(2)).tolist() == [[0, 3], [5, 0]]
    assert graph.n_edges == 2


def test_buffers_move_and_are_not_saved() -> None:
    graph, a = make(False)
    assert graph.state_dict() == {}
    x = torch.randn(9, 3)
    torch.testing.assert_close(graph.to(torch.float32)(x), a.float() @ x)
    assert graph.get_buffer("crow").dtype == torch.int32
    assert graph.get_buffer("col").dtype == torch.int32
    assert repr(graph) == f"Graph(n_nodes=9, n_edges={graph.n_edges}, symmetric=False)"


def test_copies_of_a_graph() -> None:
    graph, x = Graph.from_scipy(scipy.sparse.random_array((9, 9), density=0.4, rng=0)), torch.randn(9, 3)
    expected = graph(x)
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(twin(x), expected)
        for buffer in twin.buffers():
            buffer.zero_()
    assert torch.equal(graph(x), expected)
    assert torch.equal(graph.share_memory()(x), expected)


def test_graphs_refuse() -> None:
    with pytest.raises(PatternError, match=r"a graph is a square matrix, got \(2, 3\)"):
        Graph(scipy.sparse.csr_array((2, 3)))
    for bad in (np.nan, np.inf):
        with pytest.raises(PatternError, match="NaN or infinite"):
            Graph(scipy.sparse.csr_array(np.array([[bad]])))
        with pytest.raises(PatternError, match="NaN or infinite"):
            normalized_bipartite(scipy.sparse.csr_array(np.array([[bad, 1.0]])))


@pytest.mark.parametrize(
    "table", [nn.Embedding(8, 2), SparseEmbedding(8, 2, density=0.5)], ids=["dense", "sparse"]
)
def test_propagation_refuses(table: Any) -> None:
    graph, _ = make(True)
    with pytest.raises(SparsecoreError, match="one row for each of the 9 nodes of the graph, got 8"):
        propagate_mean(graph, table, 2)
    with pytest.raises(SparsecoreError, match="hops must be at least 1, got 0"):
        propagate_mean(graph, table, 0)
    fitting = type(table)(9, 2, **({"density": 0.5} if isinstance(table, SparseEmbedding) else {}))
    with pytest.raises(SparsecoreError, match=r"rows must be one-dimensional, got shape \(2, 1\)"):
        propagate_mean(graph.float(), fitting, 2, torch.zeros(2, 1, dtype=torch.int64))
    for row in (-1, 9):
        with pytest.raises(IndexError):
            propagate_mean(graph, fitting, 2, torch.tensor([0, row]))
    graph.double()
    with pytest.raises(SparsecoreError, match="got 8"):
        graph(torch.ones(8, 2, dtype=torch.float64))
    with pytest.raises(SparsecoreError, match="propagate needs one floating-point type"):
        graph(torch.ones(9, 2))
    with pytest.raises(SparsecoreError, match="accumulate_rows sums looked-up rows only"):
        propagate_mean(graph, SparseEmbedding(9, 2, density=0.5, accumulate_rows=3), 1)


def test_a_reordered_graph_is_the_same_graph() -> None:
    for symmetric in (True, False):
        graph, a = make(symmetric)
        order = torch.tensor([4, 8, 0, 2, 1, 3, 7, 6, 5])
        moved = graph.reordered(order)
        assert moved.symmetric is symmetric
        assert moved.get_buffer("edge_weight").dtype is torch.float64
        x = torch.randn(9, 3, dtype=torch.float64)
        close(moved(x[order]), (a @ x)[order])
    for wrong in (order[:8], order.clamp(max=7), order[None]):
        with pytest.raises(SparsecoreError, match="each of the 9 nodes once"):
            graph.reordered(wrong)
    with pytest.raises(SparsecoreError, match=r"first must be in 0 \.\. 9, got 10"):
        graph.locality_order(10)


def test_locality_order_puts_communities_together() -> None:
    """Two sides whose communities are shuffled: rows that are computed one after the other read few nodes again."""
    rng = np.random.default_rng(0)
    users, items, communities, draws = 3000, 2000, 16, 60_000
    of_user, of_item = rng.integers(communities, size=users), rng.integers(communities, size=items)
    user = rng.integers(users, size=draws)
    chosen = np.where(rng.random(draws) < 0.9, of_user[user], rng.integers(communities, size=draws))
    members, sizes = np.argsort(of_item, kind="stable"), np.bincount(of_item, minlength=communities)
    item = members[np.cumsum(sizes)[chosen] - 1 - rng.integers(2**31, size=draws) % sizes[chosen]]
    ratings = scipy.sparse.coo_array((np.ones(draws), (user, item)), shape=(users, items))
    graph = normalized_bipartite(ratings)
    order = graph.locality_order(users)
    assert torch.equal(order.sort().values, torch.arange(users + items))
    assert bool((order[:users] < users).all())
    assert torch.equal(order, graph.locality_order(users))

    def read(some: Graph) -> float:
        """Distinct nodes that 100 rows read, on average."""
        crow, col = some.get_buffer("crow"), some.get_buffer("col")
        begins = range(0, some.n_nodes, 100)
        return float(np.mean([len(col[crow[b] : crow[min(b + 100, some.n_nodes)]].unique()) for b in begins]))

    assert read(graph.reordered(order)) < 0.6 * read(graph)


@pytest.mark.parametrize("n", [1, 5, 700])
def test_locality_order_of_graphs_without_edges(n: int) -> None:
    order = Graph(scipy.sparse.csr_array((n, n))).locality_order(n // 2)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert bool((order[: n // 2] < n // 2).all())
