"""Products of a sparse weight W (rows = outputs, cols = inputs) with dense activations, by torch.sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.backends.torch.csr import csr

__all__ = ["sddmm", "spmm", "spmm_t"]


def spmm(values: Tensor, crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    if x.shape[0] == 0:
        return x.new_empty((0, crow.numel() - 1))
    return torch.sparse.mm(csr(values, crow, col, x.shape[1]), x.t()).t().contiguous()


def spmm_t(values: Tensor, crow: Tensor, col: Tensor, dy: Tensor, n_cols: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    if dy.shape[0] == 0:
        return dy.new_empty((0, n_cols))
    return torch.mm(dy, csr(values, crow, col, n_cols)).contiguous()


def sddmm(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    zeros = x.new_zeros(col.numel())
    if x.shape[0] == 0:
        return zeros
    return torch.sparse.sampled_addmm(csr(zeros, crow, col, x.shape[1]), dy.t(), x, beta=0.0).values()
