"""Retrieval from a sparse table: the best rows for each query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsecore import ops
from sparsecore.errors import SparsecoreError
from sparsecore.foreign import canonical_csr
from sparsecore.nn.base import SparseModule

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["score_topk"]


def score_topk(
    queries: Tensor, table: SparseModule, k: int, seen: scipy.sparse.sparray | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of a sparse table with the largest dot product with each query: ``topk(queries E^T, k)``.

    On the CPU the (B, rows) matrix of scores never exists: memory is O(B k). Scores should be finite.

    Args:
        queries: (B, cols), dense.
        table: E, (rows, cols): a `SparseEmbedding`, or the weight of any sparse module.
        k: how many, at least 1.
        seen: scipy.sparse matrix (B, rows); what it stores in row b (whatever the value) is left out for query b.

    Returns:
        Scores (B, k) and row ids (B, k, int64), best first; among equal scores the lower id first. Where fewer than k
        rows are left, the score is -inf and the id -1.

    Multiply-adds: ``B nnz``. Not differentiable.

    Raises:
        SparsecoreError: if shapes do not fit, or k < 1.

    Example:
        >>> scores, items = score_topk(user_vectors, item_table, k=20, seen=interactions[users])
    """
    if not isinstance(table, SparseModule):
        raise SparsecoreError(f"score_topk needs a sparse table, got {type(table).__name__}")
    rows, cols = table.shape
    if queries.dim() != 2 or queries.shape[1] != cols:
        raise SparsecoreError(f"queries must be (B, {cols}) for this table, got {tuple(queries.shape)}")
    seen_arrays: tuple[Tensor | None, Tensor | None] = (None, None)
    if seen is not None:
        source: Any = seen
        if not hasattr(source, "tocsr"):
            raise SparsecoreError(
                f"seen must be a scipy.sparse matrix, got {type(seen).__name__}; scipy.sparse.csr_array(...) makes one"
            )
        if source.shape != (queries.shape[0], rows):
            raise SparsecoreError(f"seen must be {(queries.shape[0], rows)}, got {source.shape}")
        csr = canonical_csr(source)
        device = queries.device
        seen_arrays = (
            torch.from_numpy(csr.indptr.astype(np.int64)).to(device),
            torch.from_numpy(csr.indices.astype(np.int64)).to(device),
        )
    queries = queries.detach()
    if torch.is_autocast_enabled(queries.device.type):
        queries = queries.to(table.values.dtype)
    values, *index = table.operands
    return ops.score_topk(queries, values.detach(), *index, k, *seen_arrays)
