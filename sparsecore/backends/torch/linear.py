"""Products of a sparse weight W (rows = outputs, cols = inputs) with dense activations, by torch.sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.backends.torch.csr import Product, csr, indices, product

__all__ = ["sddmm", "spmm", "spmm_t"]


def spmm(
    values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor, *, product: Product = product
) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    if x.shape[0] == 0:
        return x.new_empty((0, crow.shape[0] - 1))
    index = indices(crow, col, x.shape[1])
    # On a GPU the product with a transposed view took up to ten times as long as the one with its copy.
    return product(values, *index, x.shape[1], x.t().contiguous()).t().contiguous()


def spmm_t(
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    dy: Tensor,
    n_cols: int,
    *,
    product: Product = product,
) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    if dy.shape[0] == 0:
        return dy.new_empty((0, n_cols))
    index = indices(crow, col, n_cols)
    return product(values, *index, n_cols, dy.t().contiguous(), transposed=True).t().contiguous()


def sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    zeros = x.new_zeros(nnz)
    if x.shape[0] == 0:
        return zeros
    where = csr(zeros, *indices(crow, col, x.shape[1]), x.shape[1])
    return torch.sparse.sampled_addmm(where, dy.t(), x, beta=0.0).values()
