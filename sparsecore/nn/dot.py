"""Scores of pairs of rows of sparse tables."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore import ops
from sparsecore.errors import SparsecoreError
from sparsecore.nn.embedding import SparseEmbedding
from sparsecore.nn.replicas import refuse_sparse_gradient

__all__ = ["gather_dot"]


def gather_dot(a: SparseEmbedding, ids_a: Tensor, b: SparseEmbedding, ids_b: Tensor) -> Tensor:
    """``a[ids_a] . b[ids_b]``: scores of pairs, forward without the rows themselves.

    Args:
        a, b: tables of the same width; they may be one.
        ids_a: (n,), int64.
        ids_b: (n,), or (n, m): m rows of b for each of a (a positive and its negatives, say).

    Returns:
        Of the shape of ids_b. Gradients are sparse vectors if both tables have ``sparse=True``.

    Multiply-adds: ``numel(ids_b) * embedding_dim`` forward (every column of a row is multiplied, as rows expand in
    registers); backward the nonzeros of b's rows that occur, twice.

    Raises:
        SparsecoreError: for other modules, if widths or shapes do not fit or one table alone has sparse gradients.
        IndexError: an id outside its table (on the CPU).

    Example:
        >>> scores = gather_dot(users, user_ids, items, torch.stack((positives, negatives), 1))
    """
    for table in (a, b):
        if not isinstance(table, SparseEmbedding):
            raise SparsecoreError(f"gather_dot needs two SparseEmbedding, got {type(table).__name__}")
    if a.embedding_dim != b.embedding_dim:
        raise SparsecoreError(f"both tables must have one width, got {a.embedding_dim} and {b.embedding_dim}")
    if a.sparse != b.sparse:
        raise SparsecoreError("give both tables sparse=True, or neither")
    trainable = a.values.requires_grad or b.values.requires_grad
    run = ops.gather_dot
    if a.sparse and trainable:
        run = ops.gather_dot_touched
        if not torch.compiler.is_compiling():
            refuse_sparse_gradient(a.values)
            refuse_sparse_gradient(b.values)
    return run(*a.operands, ids_a, *b.operands, ids_b, a.embedding_dim)
