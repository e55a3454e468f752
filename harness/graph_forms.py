"""Hops over a graph: our form, and torch.sparse's and scipy's.

Made as the forms of `harness.kernel_forms`, and measured with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sparsecore
from harness.operands import Forms, Run, Table, by_torch_sparse, random_ids, torch_csr
from sparsecore import ops

__all__ = ["propagate", "propagate_mean", "propagate_mean_grad", "propagate_rows", "propagate_rows_t"]


def propagate(density: float, dim: int, users: int = 0, items: int = 0, reordered: bool = False) -> Forms:
    """The density is that of nothing here: both sides multiply the same graph with dense rows."""
    import scipy.sparse

    graph = _graph(users, items, reordered)
    crow, col, weight = graph.arrays()[:3]
    x, shape = torch.randn(graph.n_nodes, dim), (graph.n_nodes, graph.n_nodes)
    narrow, wide = _torch_graph(graph, torch.int32), _torch_graph(graph, torch.int64)
    matrix = scipy.sparse.csr_array((weight.numpy(), col.numpy(), crow.numpy()), shape=shape)
    numpy = x.numpy()
    return Forms(
        ours=lambda: graph(x),
        dense={"torch.sparse CSR int32": lambda: narrow @ x, "torch.sparse CSR int64": lambda: wide @ x},
        others={
            "scipy": lambda: matrix @ numpy,
            **by_torch_sparse(sparsecore.Pattern(crow, col, shape), weight, x),
        },
        flops=2 * graph.n_edges * dim,
        nbytes=4 * graph.n_edges * dim,
    )


def propagate_mean(
    density: float, dim: int, hops: int, users: int = 0, items: int = 0, encoding: str | None = None
) -> Forms:
    """Final embeddings of LightGCN from a table of some density, on a graph in the order in which it is trained."""
    graph = _graph(users, items, True)
    table = sparsecore.SparseEmbedding(graph.n_nodes, dim, density=density)
    if encoding is not None:
        table.set_encoding(encoding)
    values, index, arrays = table.values.detach(), table.index, graph.arrays()
    dense = table.to_dense().weight.detach()
    return Forms(
        ours=lambda: ops.propagate_mean(*arrays, values, *index, dim, hops),
        dense=_by_torch(graph, dense, hops),
        others={"dense, our propagation": lambda: _mean(graph, dense, hops)},
        flops=2 * graph.n_edges * dim * hops,
        nbytes=4 * graph.n_edges * dim * hops,
        resident=values.nbytes + sum(part.nbytes for part in index if part is not None),
        dense_resident=dense.nbytes,
    )


def propagate_mean_grad(
    density: float, dim: int, hops: int, users: int = 0, items: int = 0, encoding: str | None = None
) -> Forms:
    """Its gradient in the table: the same sum over the graph, which is symmetric, at the nonzeros."""
    graph = _graph(users, items, True)
    weight = Table(graph.n_nodes, dim, density, encoding=encoding)
    arrays, grad = graph.arrays(), torch.randn(graph.n_nodes, dim)
    return Forms(
        ours=lambda: ops.propagate_mean_grad(*arrays, *weight.index, grad, hops, weight.nnz),
        dense=_by_torch(graph, grad, hops),
        flops=2 * graph.n_edges * dim * hops,
        nbytes=4 * graph.n_edges * dim * hops,
        resident=weight.nbytes,
        dense_resident=grad.nbytes,
    )


def _mean(hop: Callable[[Tensor], Tensor], x: Tensor, hops: int) -> Tensor:
    total = x
    for _ in range(hops):  # Horner's rule: E + A(E + A(E + ..))
        total = hop(total).add_(x)
    return total.div_(hops + 1)


def _by_torch(graph: sparsecore.Graph, x: Tensor, hops: int) -> dict[str, Run]:
    narrow, wide = _torch_graph(graph, torch.int32), _torch_graph(graph, torch.int64)
    return {
        "torch.sparse CSR int32": lambda: _mean(lambda total: narrow @ total, x, hops),
        "torch.sparse CSR int64": lambda: _mean(lambda total: wide @ total, x, hops),
    }


def propagate_rows(density: float, dim: int, batch: int, users: int = 0, items: int = 0) -> Forms:
    """Some nodes' rows of a hop: the last one of a batch. torch's CSR has no rows to choose."""
    graph = _graph(users, items, True)
    arrays, x, narrow = graph.arrays(), torch.randn(graph.n_nodes, dim), _torch_graph(graph, torch.int32)
    a, b = (random_ids(graph.n_nodes, batch) for _ in range(2))
    return Forms(
        ours=lambda: ops.propagate_rows(*arrays, x, a()),
        dense={"torch.sparse CSR int32, then rows": lambda: (narrow @ x)[b()]},
    )


def propagate_rows_t(density: float, dim: int, batch: int, users: int = 0, items: int = 0) -> Forms:
    """The gradient of `propagate_rows`, over a graph that is symmetric."""
    graph = _graph(users, items, True)
    arrays, grad, narrow = graph.arrays(), torch.randn(batch, dim), _torch_graph(graph, torch.int32)
    whole, (a, b) = torch.zeros(graph.n_nodes, dim), (random_ids(graph.n_nodes, batch) for _ in range(2))
    return Forms(
        ours=lambda: ops.propagate_rows_t(*arrays, grad, a()),
        dense={"rows, then torch.sparse CSR int32": lambda: narrow @ whole.zero_().index_add_(0, b(), grad)},
    )


def _graph(users: int, items: int, reordered: bool) -> sparsecore.Graph:
    """Gowalla's, or a random one; perhaps in an order in which neighbours are close together."""
    import scipy.sparse

    matrix: Any
    if users:
        matrix = scipy.sparse.random_array((users, items), density=0.05, format="csr", rng=0)
    else:
        from recsys.data import load

        matrix = load("gowalla", data_dir=os.environ["SPARSECORE_DATA"]).train
    graph = sparsecore.normalized_bipartite(matrix)
    return graph.reordered(graph.locality_order(matrix.shape[0])) if reordered else graph


def _torch_graph(graph: sparsecore.Graph, kind: torch.dtype) -> Tensor:
    crow, col, weight = graph.arrays()[:3]
    return torch_csr(crow.to(kind), col.to(kind), weight, (graph.n_nodes, graph.n_nodes))
