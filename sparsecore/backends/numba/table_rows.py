"""Rows of a sparse table E as operands of dense hops: added to them, taken from them, propagated.

Every sum is in the order of the graph's columns whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.jit import array, kernel, share_out, split, threads
from sparsecore.backends.numba.simd import (
    at,
    bits,
    count,
    first_lanes,
    fma,
    load,
    mul,
    prefetch,
    put,
    splat,
    store,
    store_masked,
    unpack,
    zeros,
)

__all__ = ["add_rows", "number", "propagate_table", "sample"]

EDGES_AHEAD = 32  # rows that edges ask for are anywhere: see `graph`
AHEAD = 1024  # values of a table, which is read from its beginning to its end
_STRIP = 32  # columns of a sparse table that are expanded at a time


def number(scale: float, like: Tensor) -> Any:
    return np.float32(scale) if like.dtype == torch.float32 else np.float64(scale)


def propagate_table(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    values: Tensor,
    t_crow: Tensor,
    t_col: Tensor | None,
    n_cols: int,
    *,
    add: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """``scale (A E)``, or ``scale (A E + E)``, for a sparse table E: dense (M, n_cols).

    E is expanded 32 columns at a time into scratch of N x 32: a row that many edges ask for is expanded once. Reading
    the nonzeros at every edge takes 1.3 to 2 times as long at densities 0.1 to 0.5.
    """
    out = torch.empty((crow.numel() - 1, n_cols), dtype=values.dtype, device="cpu")
    rows, factor = t_crow.shape[0] - 1, number(scale, values)
    strip = torch.empty((rows, _STRIP), dtype=values.dtype, device="cpu").numpy()
    graph, v, index = [*map(array, (crow, col, weight))], array(values), array(t_crow)
    n = threads(col.numel() * n_cols)
    cursor = np.empty(rows if t_col is not None else 0, np.int64)
    for begin in range(0, n_cols, _STRIP):
        if t_col is None:
            _strip_of_bitmap(index, index.view(np.uint16), v, begin, strip, n)
        else:
            _strip_of_csr(index, array(t_col), v, begin, cursor, strip, n)
        _propagate_strip(*graph, strip, add, factor, begin, out.numpy(), n)
    return out


def add_rows(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, scale: float) -> Tensor:
    """``X += scale E`` in place, for a sparse E of X's shape."""
    _add(array(crow), array(col), array(values), number(scale, x), x.numpy(), threads(values.numel()))
    return x


def sample(crow: Tensor, col: Tensor, dense: Tensor, nnz: int) -> Tensor:
    """Entries of a dense (rows, cols) matrix at the nonzeros of a pattern: (nnz,)."""
    out = torch.empty(nnz, dtype=dense.dtype, device="cpu")
    _sample(array(crow), array(col), array(dense), out.numpy(), threads(nnz))
    return out


# ---------------------------------------------------------------- sparse X


@kernel
def _strip_of_csr(crow, col, values, begin, cursor, strip, n_chunks, chunk):
    """32 columns of E from ``begin`` on, dense; the cursor of each row moves on to the next 32."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
        for c in range(_STRIP):
            put(strip, i * _STRIP + c, strip.dtype.type(0))
        k, last = np.int64(at(crow, i)) if begin == 0 else at(cursor, i), np.int64(at(crow, i + 1))
        while k < last and np.int64(at(col, k)) < begin + _STRIP:
            put(strip, i * _STRIP + np.int64(at(col, k)) - begin, at(values, k))
            k += 1
        put(cursor, i, k)


@kernel
def _strip_of_bitmap(index, masks, values, begin, strip, n_chunks, chunk):
    """32 columns of E from ``begin`` on, dense."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    rows, words = index.shape[0] - 1, index.shape[1]
    for i in range(rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks):
        k = np.int64(at(index, i * words))
        for word in range(i * words + 1, i * words + 1 + begin // 32):
            k += count(np.uint32(at(index, word)))
        prefetch(values, k + AHEAD)
        prefetch(values, k + AHEAD + 16)
        block = 2 * i * words + 2 + begin // 16
        left, right = bits(masks, block), bits(masks, block + 1)
        store(strip, i * _STRIP, unpack(values, k, left))
        store(strip, i * _STRIP + 16, unpack(values, k + count(left), right))


@kernel
def _propagate_strip(crow, col, weight, strip, plus, scale, begin, out, n_chunks, chunk):
    """Columns of the product that belong to a strip of E."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = out.shape[1]
    end = col.shape[0] - 1
    zero, factor = zeros(strip), splat(scale)
    left, right = first_lanes(min(16, d - begin)), first_lanes(max(0, min(16, d - begin - 16)))
    for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
        s0, s1 = zero, zero
        if plus:
            s0, s1 = load(strip, i * _STRIP), load(strip, i * _STRIP + 16)
        for e in range(np.int64(crow[i]), np.int64(crow[i + 1])):
            soon = np.int64(at(col, min(e + EDGES_AHEAD, end))) * _STRIP
            prefetch(strip, soon)
            prefetch(strip, soon + 16)
            a, row = splat(at(weight, e)), np.int64(at(col, e)) * _STRIP
            s0 = fma(a, load(strip, row), s0)
            s1 = fma(a, load(strip, row + 16), s1)
        store_masked(out, i * d + begin, mul(factor, s0), left)
        store_masked(out, i * d + begin + 16, mul(factor, s1), right)


# ---------------------------------------------------------------- whole tables


@kernel
def _add(crow, col, values, scale, x, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = x.shape[1]
    for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
        for k in range(np.int64(crow[i]), np.int64(crow[i + 1])):
            place = i * d + np.int64(at(col, k))
            put(x, place, at(x, place) + scale * at(values, k))


@kernel
def _sample(crow, col, x, out, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = x.shape[1]
    for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
        for k in range(np.int64(crow[i]), np.int64(crow[i + 1])):
            put(out, k, at(x, i * d + np.int64(at(col, k))))
