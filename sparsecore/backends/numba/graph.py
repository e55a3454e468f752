"""Propagation of embeddings over a graph, and what joins a sparse table with dense hops.

Sums run in the order of the graph's columns whatever the number of threads.
"""

from __future__ import annotations

import torch
from numba import prange
from torch import Tensor

from sparsecore.backends.numba.jit import array, device_function, kernel, split, threads
from sparsecore.encoding import decode

__all__ = ["add_rows_", "propagate", "propagate_table", "sample"]

_VECTOR = 16


def propagate(crow: Tensor, col: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``A X`` for a graph A in CSR: X (N, d) -> (M, d)."""
    out = torch.empty((crow.numel() - 1, x.shape[1]), dtype=x.dtype)
    n = threads(col.numel() * x.shape[1])
    _propagate(*map(array, (crow, col, weight, x)), out.numpy(), n)
    return out


def propagate_table(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    values: Tensor,
    t_crow: Tensor,
    t_col: Tensor | None,
    n_cols: int,
) -> Tensor:
    """``A E`` for a sparse table E (values, t_crow, t_col): reads E's nonzeros only. Dense (M, n_cols)."""
    if t_col is None:
        t_crow, t_col = decode(t_crow, n_cols)
    out = torch.empty((crow.numel() - 1, n_cols), dtype=values.dtype)
    n = threads(col.numel() * n_cols)
    _propagate_table(*map(array, (crow, col, weight, values, t_crow, t_col)), out.numpy(), n)
    return out


def add_rows_(x: Tensor, values: Tensor, crow: Tensor, col: Tensor | None) -> Tensor:
    """``X += E`` in place, for a sparse E of X's shape."""
    if col is None:
        crow, col = decode(crow, x.shape[1])
    _add_rows(array(values), array(crow), array(col), x.numpy(), threads(values.numel()))
    return x


def sample(crow: Tensor, col: Tensor | None, dense: Tensor, nnz: int) -> Tensor:
    """Entries of a dense (rows, cols) matrix at the nonzeros of a pattern: (nnz,)."""
    if col is None:
        crow, col = decode(crow, dense.shape[1])
    out = torch.empty(col.numel(), dtype=dense.dtype)
    _sample(array(crow), array(col), array(dense), out.numpy(), threads(col.numel()))
    return out


@device_function
def _axpy(a, x, j, out, i):
    """out[i] += a * x[j], a constant number of lanes at a time, then the rest."""
    d = out.shape[1]
    whole = d // _VECTOR * _VECTOR
    for base in range(0, whole, _VECTOR):
        for lane in range(_VECTOR):
            out[i, base + lane] += a * x[j, base + lane]
    for c in range(whole, d):
        out[i, c] += a * x[j, c]


@kernel
def _propagate(crow, col, weight, x, out, n_chunks):
    d = out.shape[1]
    whole = d // _VECTOR * _VECTOR
    for chunk in prange(n_chunks):
        for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
            for c in range(d):
                out[i, c] = 0
            first, last = crow[i], crow[i + 1]
            fours = first + (last - first) // 4 * 4
            for k in range(first, fours, 4):
                a0, a1, a2, a3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
                j0, j1, j2, j3 = col[k], col[k + 1], col[k + 2], col[k + 3]
                for base in range(0, whole, _VECTOR):
                    for lane in range(_VECTOR):
                        out[i, base + lane] += (
                            a0 * x[j0, base + lane]
                            + a1 * x[j1, base + lane]
                            + a2 * x[j2, base + lane]
                            + a3 * x[j3, base + lane]
                        )
                for c in range(whole, d):
                    out[i, c] += a0 * x[j0, c] + a1 * x[j1, c] + a2 * x[j2, c] + a3 * x[j3, c]
            for k in range(fours, last):
                _axpy(weight[k], x, col[k], out, i)


@kernel
def _propagate_table(crow, col, weight, values, t_crow, t_col, out, n_chunks):
    d = out.shape[1]
    for chunk in prange(n_chunks):
        for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
            for c in range(d):
                out[i, c] = 0
            for k in range(crow[i], crow[i + 1]):
                a, j = weight[k], col[k]
                for m in range(t_crow[j], t_crow[j + 1]):
                    out[i, t_col[m]] += a * values[m]


@kernel
def _add_rows(values, crow, col, x, n_chunks):
    for chunk in prange(n_chunks):
        for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
            for k in range(crow[i], crow[i + 1]):
                x[i, col[k]] += values[k]


@kernel
def _sample(crow, col, dense, out, n_chunks):
    for chunk in prange(n_chunks):
        for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
            for k in range(crow[i], crow[i + 1]):
                out[k] = dense[i, col[k]]
