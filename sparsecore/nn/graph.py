"""Graphs, and propagation of dense or sparse embeddings over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from sparsecore import ops
from sparsecore.errors import PatternError, SparsecoreError
from sparsecore.foreign import canonical_csr
from sparsecore.interop import split
from sparsecore.nn.embedding import SparseEmbedding
from sparsecore.nn.index_buffers import integers_kept, keeps_contents
from sparsecore.pattern import Pattern
from sparsecore.sizes import pointer_dtype

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["Graph", "normalized_bipartite", "propagate_mean"]


class Graph(nn.Module):
    """A weighted graph A in CSR with int32 indices, as buffers that are not saved with the model.

    ``graph(x)`` is ``A x``. The transpose, needed for gradients, is kept only if the graph is not symmetric.
    """

    def __init__(self, matrix: scipy.sparse.sparray, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        csr = canonical_csr(matrix)
        if csr.shape[0] != csr.shape[1]:
            raise PatternError(f"a graph is a square matrix, got {csr.shape}")
        if csr.dtype.kind == "c":
            raise PatternError(
                "a graph has real weights, got complex ones: give their real part or magnitude"
            )
        if not np.isfinite(csr.data).all():
            raise PatternError("the graph has NaN or infinite weights")
        transpose = csr.T.tocsr()
        transpose.sum_duplicates()
        self.symmetric = bool((csr != transpose).nnz == 0)
        dtype = dtype or torch.get_default_dtype()
        self._add("", csr, dtype)
        if not self.symmetric:
            self._add("_t", transpose, dtype)
        self.n_nodes = csr.shape[0]

    def _add(self, suffix: str, csr: Any, dtype: torch.dtype) -> None:
        pointers = pointer_dtype(csr.nnz)
        for name, data, kind in (
            ("crow", csr.indptr, pointers),
            ("col", csr.indices, torch.int32),
            ("edge_weight", csr.data, dtype),
        ):
            self.register_buffer(name + suffix, torch.from_numpy(np.array(data)).to(kind), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        emptied = not keeps_contents(fn)
        if emptied and self.get_buffer("crow").is_meta:
            raise SparsecoreError(
                "to_empty() of a graph that was moved to the meta device, where it lost its edges: make it anew"
            )
        with integers_kept(self):
            super()._apply(fn, recurse)
        if emptied:  # a graph is data, which nothing would fill in again
            for name, buffer in before.items():
                if buffer is not None:
                    self.get_buffer(name).copy_(buffer)
        return self

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.sparray, dtype: torch.dtype | None = None) -> Graph:
        """From any scipy.sparse matrix; duplicates are added up.

        Raises:
            PatternError: if it is not square, or has weights that are not finite.
        """
        return cls(matrix, dtype)

    @classmethod
    def from_sparse(cls, matrix: Any, dtype: torch.dtype | None = None) -> Graph:
        """From a sparse matrix of torch, scipy or torch-sparse, copied, on the matrix's device.

        Back: ``graph.pattern.to_scipy(graph.edge_weight)``, likewise ``to_csr``, ``to_coo`` and ``to_torch_sparse``.

        Args:
            matrix: (n_nodes, n_nodes), as `sparsecore.split` takes it; entry (i, j) is the weight of j's row in row i
                of ``graph(x)``.
            dtype: of the edge weights; None for torch's default.

        Raises:
            PatternError: if it is no sparse matrix, is not square, or has weights that are not finite.
        """
        pattern, weights = split(matrix)
        graph = cls(pattern.to("cpu").to_scipy(weights.cpu()), dtype)
        return graph.to(weights.device)

    @property
    def pattern(self) -> Pattern:
        """Where the edges are; it shares the graph's indices. Edge k has the weight ``edge_weight[k]``."""
        return Pattern(self.get_buffer("crow"), self.get_buffer("col"), (self.n_nodes, self.n_nodes))

    def locality_order(self, first: int = 0) -> Tensor:
        """(n_nodes,) nodes in an order in which those with many neighbours in common are close together.

        A CPU multiplies ``graph.reordered(order)`` in less time where its cache does not hold the embeddings, because
        rows computed soon after one another read the same ones. To find it takes about as long as
        30 log2(n_nodes / 256) hops with one column, once (`sparsecore.locality.node_order`: spectral bisection).

        Args:
            first: nodes before this one stay before the others; in a bipartite graph, the number of nodes of one side.

        Raises:
            SparsecoreError: if ``first`` is not in 0 .. n_nodes.
        """
        from sparsecore.locality import node_order  # with scipy, which an import of sparsecore does without

        if not 0 <= first <= self.n_nodes:
            raise SparsecoreError(f"first must be in 0 .. {self.n_nodes}, got {first}")
        return torch.from_numpy(node_order(self._scipy(), first))

    def reordered(self, order: Tensor) -> Graph:
        """The same graph with node ``order[i]`` as its node i: row i of its result, and of what it multiplies.

        Raises:
            SparsecoreError: if ``order`` does not hold every node once.
        """
        if order.shape != (self.n_nodes,) or not torch.equal(order.sort().values, torch.arange(self.n_nodes)):
            raise SparsecoreError(f"order must hold each of the {self.n_nodes} nodes once")
        nodes, edge_weight = order.numpy(), self.get_buffer("edge_weight")
        return Graph(self._scipy()[nodes][:, nodes], edge_weight.dtype).to(edge_weight.device)

    def _scipy(self) -> Any:
        weight = self.get_buffer("edge_weight").cpu()
        known = weight.dtype in (torch.float32, torch.float64)
        return self.pattern.to("cpu").to_scipy(weight if known else weight.float())

    @property
    def n_edges(self) -> int:
        """Stored entries of A."""
        return int(self.get_buffer("col").numel())

    def arrays(self) -> tuple[Tensor, ...]:
        """A and its transpose as six arrays, in the order of ``ops.propagate``."""
        forward = tuple(self.get_buffer(name) for name in ("crow", "col", "edge_weight"))
        if self.symmetric:
            return forward + forward
        return forward + tuple(self.get_buffer(name) for name in ("crow_t", "col_t", "edge_weight_t"))

    def forward(self, x: Tensor) -> Tensor:
        """``A x``: (n_nodes, d) -> (n_nodes, d); ``n_edges * d`` multiply-adds, and as many backward."""
        if x.dim() != 2:
            raise SparsecoreError(
                f"expected x of shape ({self.n_nodes}, d), got {tuple(x.shape)}; use .flatten(1)"
            )
        _check_rows(x.shape[0], self)
        return ops.propagate(*self.arrays(), x)

    def extra_repr(self) -> str:
        return f"n_nodes={self.n_nodes}, n_edges={self.n_edges}, symmetric={self.symmetric}"


def normalized_bipartite(matrix: scipy.sparse.sparray, dtype: torch.dtype | None = None) -> Graph:
    """Graph over users and items of an interaction matrix R, ``D^-1/2 [[0, R], [R^T, 0]] D^-1/2``.

    Users come first, then items; D are the degrees. Nodes without interactions keep empty rows. This is the adjacency
    of LightGCN (He et al., SIGIR 2020), without self-loops.

    Args:
        matrix: (users, items), any weights (the degrees are their sums).
        dtype: of the edge weights; None for torch's default.
    """
    import scipy.sparse

    ratings = canonical_csr(matrix).tocoo().astype(np.float64)
    if not np.isfinite(ratings.data).all():
        raise PatternError("the interactions have NaN or infinite weights")
    scale = [np.zeros(n) for n in ratings.shape]
    for axis, factor in enumerate(scale):
        degree = np.asarray(ratings.sum(axis=1 - axis)).ravel()
        np.power(degree, -0.5, where=degree > 0, out=factor)
    # Scaled before it is mirrored: the two halves then agree to the last bit, and the transpose need not be kept.
    ratings.data *= scale[0][ratings.row] * scale[1][ratings.col]
    adjacency: Any = scipy.sparse.block_array([[None, ratings], [ratings.T, None]], format="csr")
    return Graph(adjacency, dtype)


def propagate_mean(
    graph: Graph, table: nn.Embedding | SparseEmbedding, hops: int, rows: Tensor | None = None
) -> Tensor:
    """``(E + A E + .. + A^hops E) / (hops + 1)`` for the table's rows E: dense, (n_nodes, d); or of some rows.

    With ``rows`` (n,), int64 or int32, the result is ``[rows]`` of that, (n, d), which costs less than to choose them
    afterwards: the last hop is multiplied at those rows alone, and the first hop backward begins at them alone. (Not
    where they are more than half as many as the nodes, nor with one hop over a sparse table.)

    For a sparse table the first hop expands it a strip of 32 columns at a time, on the numba backend (torch.sparse
    expands hop 0 for the call); hops after the first are dense, because one hop fills the embeddings in. Forward, one
    hop is live at a time.

    Multiply-adds on nonzeros: ``hops * n_edges * d`` for a dense table; for a sparse one the first hop has about
    ``density * n_edges * d``. (On the clock it is no cheaper than a dense hop: rows with gaps would have to be read
    edge by edge, which takes longer than to expand them once.) Backward ``hops * n_edges * d`` either way.

    Source: He et al., LightGCN, SIGIR 2020, equations 7 and 8 with equal weights.

    Raises:
        SparsecoreError: if the table is another module, or does not have one row for each node, or ``hops < 1``, or it
            accumulates rows, or ``rows`` are not one-dimensional int64 or int32.
        IndexError: if a row is not a node of the graph (noticed on the CPU).
    """
    if hops < 1:
        raise SparsecoreError(f"hops must be at least 1, got {hops}")
    if not isinstance(table, (nn.Embedding, SparseEmbedding)):  # torch.compile of torch 2.6 refuses a union
        raise SparsecoreError(
            f"propagate_mean needs a SparseEmbedding or an nn.Embedding, got {type(table).__name__}"
        )
    _check_rows(table.num_embeddings, graph)
    if isinstance(table, SparseEmbedding) and table.accumulator is not None:
        raise SparsecoreError("accumulate_rows sums looked-up rows only; leave it out of a propagated table")
    if rows is not None and rows.dim() != 1:
        raise SparsecoreError(f"rows must be one-dimensional, got shape {tuple(rows.shape)}; use .flatten()")
    if rows is not None and rows.dtype not in (torch.int64, torch.int32):
        raise SparsecoreError(
            f"rows must be int64 or int32, got {rows.dtype}; a mask's are mask.nonzero().flatten()"
        )
    if rows is None:
        return _mean(graph, table, hops)
    if 2 * rows.shape[0] > graph.n_nodes or (hops == 1 and isinstance(table, SparseEmbedding)):
        return _mean(graph, table, hops).index_select(0, rows)
    if isinstance(table, SparseEmbedding):
        own = ops.gather(*table.operands, rows, table.embedding_dim)
    else:
        own = table.weight.index_select(0, rows)
    before = _mean(graph, table, hops - 1) if hops > 1 else table.weight
    return (own + hops * ops.propagate_rows(*graph.arrays(), before, rows)) / (hops + 1)


def _mean(graph: Graph, table: nn.Embedding | SparseEmbedding, hops: int) -> Tensor:
    if isinstance(table, SparseEmbedding):
        return ops.propagate_mean(*graph.arrays(), *table.operands, table.embedding_dim, hops)
    total = table.weight
    for _ in range(hops):  # Horner's rule: E + A(E + A(E + ..))
        total = table.weight + graph(total)
    return total / (hops + 1)


def _check_rows(rows: int, graph: Graph) -> None:
    if rows != graph.n_nodes:
        raise SparsecoreError(
            f"expected one row for each of the {graph.n_nodes} nodes of the graph, got {rows}"
        )
