"""Rows of a sparse table, looked up by id, alone or summed in bags, and their gradients.

Gradients are summed row by row of the table, repeated ids in the order in which they came: one thread owns a row,
so results are the same on every run and for every number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from sparsecore.backends.numba.jit import array, kernel, split, threads
from sparsecore.encoding import decode

__all__ = ["bag", "bag_dot", "bag_grad", "gather"]


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    if col is None:
        crow, col = decode(crow, n_cols)
    out = torch.empty((ids.numel(), n_cols), dtype=values.dtype)
    _gather(array(values), array(crow), array(col), array(ids), out.numpy(), threads(out.numel()))
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
    if col is None:
        crow, col = decode(crow, n_cols)
    out = torch.empty((offsets.numel() - 1, n_cols), dtype=values.dtype)
    n = threads(_work(values, crow, ids) + out.numel())
    _bag(*map(array, (values, crow, col, ids, offsets, weights)), out.numpy(), n)
    return out


def scatter_grad(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    return bag_grad(crow, col, ids, torch.arange(ids.numel()), grad.new_ones(ids.numel()), grad, nnz)


def bag_grad(
    crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    """``out[k] = sum of weights[e] * grad[bags[e], col[k]]`` over the entries e whose id is the row of nonzero k."""
    if col is None:
        crow, col = decode(crow, grad.shape[1])
    out = torch.zeros(col.numel(), dtype=grad.dtype)
    ids, order = torch.sort(ids, stable=True)
    n = threads(_work(out, crow, ids))
    _bag_grad(*map(array, (crow, col, ids, bags[order], weights[order], grad)), out.numpy(), n)
    return out


def bag_dot(
    values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, grad: Tensor
) -> Tensor:
    """``out[e] = table[ids[e]] . grad[bags[e]]``: gradient of the entries' weights."""
    if col is None:
        crow, col = decode(crow, grad.shape[1])
    out = torch.empty(ids.numel(), dtype=values.dtype)
    n = threads(_work(values, crow, ids))
    _bag_dot(*map(array, (values, crow, col, ids, bags, grad)), out.numpy(), n)
    return out


def _work(values: Tensor, crow: Tensor, ids: Tensor) -> int:
    return ids.numel() * (1 + values.numel() // (crow.shape[0] - 1))


@kernel
def _gather(values, crow, col, ids, out, n_chunks):
    n, d = out.shape
    for chunk in prange(n_chunks):
        for e in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
            for j in range(d):
                out[e, j] = 0
            r = ids[e]
            for k in range(crow[r], crow[r + 1]):
                out[e, col[k]] = values[k]


@kernel
def _bag(values, crow, col, ids, offsets, weights, out, n_chunks):
    d = out.shape[1]
    for chunk in prange(n_chunks):
        for b in range(split(offsets, n_chunks, chunk), split(offsets, n_chunks, chunk + 1)):
            for j in range(d):
                out[b, j] = 0
            for e in range(offsets[b], offsets[b + 1]):
                r, w = ids[e], weights[e]
                for k in range(crow[r], crow[r + 1]):
                    out[b, col[k]] += w * values[k]


@kernel
def _bag_grad(crow, col, ids, bags, weights, grad, out, n_chunks):
    n = ids.shape[0]
    for chunk in prange(n_chunks):
        # A chunk begins at the first entry of a row and ends with the last one of a row.
        first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
        while 0 < first < n and ids[first] == ids[first - 1]:
            first += 1
        while 0 < last < n and ids[last] == ids[last - 1]:
            last += 1
        for e in range(first, last):
            r, b, w = ids[e], bags[e], weights[e]
            for k in range(crow[r], crow[r + 1]):
                out[k] += w * grad[b, col[k]]


@kernel
def _bag_dot(values, crow, col, ids, bags, grad, out, n_chunks):
    n = ids.shape[0]
    for chunk in prange(n_chunks):
        for e in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
            r, b = ids[e], bags[e]
            total = np.zeros(1, values.dtype)[0]
            for k in range(crow[r], crow[r + 1]):
                total += values[k] * grad[b, col[k]]
            out[e] = total
