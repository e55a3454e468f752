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
from harness.operands import Forms, by_torch_sparse, torch_csr
from sparsecore import ops

__all__ = ["propagate", "propagate_mean"]


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


def propagate_mean(density: float, dim: int, hops: int, users: int = 0, items: int = 0) -> Forms:
    """Final embeddings of LightGCN from a table of some density, on a graph in the order in which it is trained."""
    graph = _graph(users, items, True)
    table = sparsecore.SparseEmbedding(graph.n_nodes, dim, density=density)
    values, index, arrays = table.values.detach(), table.index, graph.arrays()
    dense = table.to_dense().weight.detach()
    narrow, wide = _torch_graph(graph, torch.int32), _torch_graph(graph, torch.int64)

    def mean(hop: Callable[[Tensor], Tensor]) -> Tensor:
        total = dense
        for _ in range(hops):  # Horner's rule: E + A(E + A(E + ..))
            total = hop(total).add_(dense)
        return total.div_(hops + 1)

    return Forms(
        ours=lambda: ops.propagate_mean(*arrays, values, *index, dim, hops),
        dense={
            "torch.sparse CSR int32": lambda: mean(lambda x: narrow @ x),
            "torch.sparse CSR int64": lambda: mean(lambda x: wide @ x),
        },
        others={"dense, our propagation": lambda: mean(graph)},
        flops=2 * graph.n_edges * dim * hops,
        nbytes=4 * graph.n_edges * dim * hops,
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
