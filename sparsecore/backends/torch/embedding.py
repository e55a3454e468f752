"""Rows of a sparse table, looked up by id, alone or summed in bags, and their gradients, by torch indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.backends.torch.csr import PART, entries, indices, kept, parts

__all__ = ["bag", "bag_dot", "bag_grad", "gather", "gather_dot", "id_range", "scatter_grad", "touched"]


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    crow, col = indices(crow, col, n_cols)
    out = values.new_zeros(ids.numel(), n_cols)
    for part, which, place, padding in parts(crow, ids, n_cols, col.numel()):
        # Added to 0, not written: padding may name a nonzero's column.
        out[part].view(-1).index_add_(0, which * n_cols + col[place], kept(values[place], padding))
    return out


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
    out = values.new_zeros((offsets.numel() - 1) * n_cols)
    for part, which, place, padding in parts(crow, ids, n_cols, col.numel()):
        weighted = kept(weights[part][which] * values[place], padding)
        out.index_add_(0, bags[part][which] * n_cols + col[place], weighted)
    return out.view(-1, n_cols)


def scatter_grad(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    """``out[k] = sum of grad[e, col[k]]`` over the entries e whose id is the row of nonzero k."""
    bags = torch.arange(ids.numel(), device=ids.device)
    return bag_grad(crow, col, ids, bags, grad.new_ones(ids.numel()), grad, nnz)


def touched(
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    nnz: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scatter_grad` at the nonzeros of the rows that occur: their places (t,), ascending, and values (t,).

    With sources and weights, entry e adds ``weights[e] * grad[sources[e]]``.
    """
    crow, col = indices(crow, col, grad.shape[1])
    which, place = entries(crow, ids)
    places, inverse = torch.unique(place, return_inverse=True)
    source = which if sources is None else sources[which]
    picked = grad.reshape(-1)[source * grad.shape[1] + col[place]]
    if weights is not None:
        picked = picked * weights[which]
    return places, grad.new_zeros(places.numel()).index_add_(0, inverse, picked)


def gather_dot(
    values_a: Tensor,
    crow_a: Tensor,
    col_a: Tensor | None,
    ids_a: Tensor,
    values_b: Tensor,
    crow_b: Tensor,
    col_b: Tensor | None,
    ids_b: Tensor,
    n_cols: int,
) -> Tensor:
    """``a[ids_a[e]] . b[ids_b[e, j]]`` for ids_a (n,) and ids_b (n,) or (n, m): of the shape of ids_b."""
    left = gather(values_a, crow_a, col_a, ids_a, n_cols)
    crow_b, col_b = indices(crow_b, col_b, n_cols)
    rows = torch.arange(ids_a.numel(), device=ids_a.device)
    if ids_b.dim() == 2:
        rows = rows.repeat_interleave(ids_b.shape[1], output_size=ids_b.numel())
    # Some rows at a time on a CPU. Not `bag_dot`: on a GPU the order of its additions changes from run to run.
    ids = ids_b.reshape(-1)
    step = max(1, PART // max(1, n_cols) if ids.is_cpu else ids.numel())
    pairs = zip(rows.split(step), ids.split(step), strict=True)
    products = [(left[a] * gather(values_b, crow_b, col_b, b, n_cols)).sum(-1) for a, b in pairs]
    return torch.cat(products).view(ids_b.shape)


def bag_grad(
    crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    """``out[k] = sum of weights[e] * grad[bags[e], col[k]]`` over the entries e whose id is the row of nonzero k."""
    crow, col = indices(crow, col, grad.shape[1])
    out, flat = grad.new_zeros(nnz), grad.reshape(-1)
    for part, which, place, padding in parts(crow, ids, grad.shape[1], nnz):
        picked = flat[bags[part][which] * grad.shape[1] + col[place]]
        out.index_add_(0, place, kept(weights[part][which] * picked, padding))
    return out


def bag_dot(
    values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, grad: Tensor
) -> Tensor:
    """``out[e] = table[ids[e]] . grad[bags[e]]``: gradient of the entries' weights."""
    crow, col = indices(crow, col, grad.shape[1])
    out, flat = values.new_zeros(ids.numel()), grad.reshape(-1)
    for part, which, place, padding in parts(crow, ids, grad.shape[1], col.numel()):
        picked = flat[bags[part][which] * grad.shape[1] + col[place]]
        out[part].index_add_(0, which, kept(values[place] * picked, padding))
    return out


def id_range(ids: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(ids)
    return int(low), int(high)
