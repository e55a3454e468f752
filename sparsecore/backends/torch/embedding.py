"""Rows of a sparse table, looked up by id, alone or summed in bags, and their gradients, by torch indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.backends.torch.csr import indices
from sparsecore.pattern import entries

__all__ = ["bag", "bag_dot", "bag_grad", "gather", "scatter_grad"]


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    crow, col = indices(crow, col, n_cols)
    which, place = entries(crow, ids)
    out = values.new_zeros(ids.numel() * n_cols)
    out[which * n_cols + col[place]] = values[place]
    return out.view(ids.numel(), n_cols)


def bag(
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor,
    n_cols: int,
) -> Tensor:
    """``out[b] = sum of weights[e] * table[ids[e]]`` over the entries e of bag b: dense (bags, cols)."""
    crow, col = indices(crow, col, n_cols)
    bags = torch.repeat_interleave(offsets[1:] - offsets[:-1], output_size=ids.numel())
    which, place = entries(crow, ids)
    out = values.new_zeros((offsets.numel() - 1) * n_cols)
    out.index_add_(0, bags[which] * n_cols + col[place], weights[which] * values[place])
    return out.view(-1, n_cols)


def scatter_grad(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    """``out[k] = sum of grad[e, col[k]]`` over the entries e whose id is the row of nonzero k."""
    bags = torch.arange(ids.numel(), device=ids.device)
    return bag_grad(crow, col, ids, bags, grad.new_ones(ids.numel()), grad, nnz)


def bag_grad(
    crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    """``out[k] = sum of weights[e] * grad[bags[e], col[k]]`` over the entries e whose id is the row of nonzero k."""
    crow, col = indices(crow, col, grad.shape[1])
    which, place = entries(crow, ids)
    picked = grad.reshape(-1)[bags[which] * grad.shape[1] + col[place]]
    return grad.new_zeros(nnz).index_add_(0, place, weights[which] * picked)


def bag_dot(
    values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, grad: Tensor
) -> Tensor:
    """``out[e] = table[ids[e]] . grad[bags[e]]``: gradient of the entries' weights."""
    crow, col = indices(crow, col, grad.shape[1])
    which, place = entries(crow, ids)
    picked = grad.reshape(-1)[bags[which] * grad.shape[1] + col[place]]
    return values.new_zeros(ids.numel()).index_add_(0, which, values[place] * picked)
