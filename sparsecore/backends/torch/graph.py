"""Propagation of embeddings over a graph, by torch.sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.backends.torch.csr import csr, indices
from sparsecore.pattern import Pattern

__all__ = ["add_rows_", "propagate", "propagate_table", "sample"]


def propagate(crow: Tensor, col: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``A X`` for a graph A in CSR: X (N, d) -> (M, d)."""
    return torch.sparse.mm(csr(weight, crow, col, x.shape[0]), x)


def propagate_table(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    values: Tensor,
    t_crow: Tensor,
    t_col: Tensor | None,
    n_cols: int,
) -> Tensor:
    """``A E`` for a sparse table E. torch has no such product: hop 0, an activation, is expanded."""
    hop = values.new_zeros((t_crow.shape[0] - 1, n_cols))
    return propagate(crow, col, weight, add_rows_(hop, values, t_crow, t_col))


def add_rows_(x: Tensor, values: Tensor, crow: Tensor, col: Tensor | None) -> Tensor:
    """``X += E`` in place, for a sparse E of X's shape."""
    positions = Pattern(*indices(crow, col, x.shape[1]), (x.shape[0], x.shape[1])).positions()
    x.view(-1).index_add_(0, positions, values)
    return x


def sample(crow: Tensor, col: Tensor | None, dense: Tensor, nnz: int) -> Tensor:
    """Entries of a dense (rows, cols) matrix at the nonzeros of a pattern: (nnz,)."""
    shape = (dense.shape[0], dense.shape[1])
    return dense.reshape(-1)[Pattern(*indices(crow, col, shape[1]), shape).positions()]
