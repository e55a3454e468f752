"""Products with a handful of examples, for a weight in CSR: one nonzero after the other.

For two to sixteen examples the vectors lie along the batch, whose features are packed 16 lanes wide: a nonzero costs
one load of a vector and one multiply-add, and no column is decoded twice. Results of ``spmm_t`` depend on the number of
threads (each has its own sums); those of the others do not.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from sparsecore.backends.numba.jit import device_function, kernel
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.panel_spmm_t import add_and_unpack
from sparsecore.backends.numba.panels import move, packed, split_rows
from sparsecore.backends.numba.simd import add, at, fma, load, put, splat, store, zeros
from sparsecore.encoding import has_expand

__all__ = ["dot", "sddmm", "spmm", "spmm_t"]


def spmm(values, crow, col, x, y, n_chunks):
    if len(x) == 1:
        _dot_one(values, crow, col, x[0], y[0], n_chunks)
    elif len(x) <= 4 and not has_expand():
        panel = np.zeros((x.shape[1], 4), x.dtype)
        panel[:, : len(x)] = x.T
        _sum_four(values, crow, col, panel.reshape(-1), y, n_chunks)
    else:
        tiles = workspace("tiles", n_chunks, 16 * 16 + 512, torch.from_numpy(x).dtype)
        _sum_rows(values, crow, col, packed(x, n_chunks), tiles, y, n_chunks)


def spmm_t(values, crow, col, dy, dx, n_chunks):
    batch, cols = dx.shape
    if batch == 1:
        sums = np.zeros((n_chunks, cols), dx.dtype)
        _add_one(values, crow, col, dy[0], sums, n_chunks)
        np.copyto(dx[0], sums[0])
        for part in range(1, n_chunks):
            dx += sums[part]
    else:
        sums = workspace("sums", n_chunks, 16 * cols, torch.from_numpy(dx).dtype)
        _add_rows(values, crow, col, packed(dy, n_chunks), cols, sums, n_chunks)
        add_and_unpack(sums, dx, n_chunks)


def sddmm(crow, col, dy, x, out, n_chunks):
    """One example."""
    _outer_one(crow, col, dy[0], x[0], out, n_chunks)


@kernel
def _sum_rows(values, crow, col, panel, tiles, y, n_chunks):
    """y[e, row] = sum of value * x[e, column]; ``panel`` holds x[:, column] from 16 * column on."""
    batch, rows = y.shape
    out = y.reshape(-1)
    zero = zeros(panel)
    for chunk in prange(n_chunks):
        tile = tiles[chunk]
        spare = tile[256:]
        end = split_rows(crow, n_chunks, chunk + 1)
        for first in range(split_rows(crow, n_chunks, chunk), end, 16):
            n = min(16, end - first)
            for i in range(n):
                k, last = np.intp(crow[first + i]), np.intp(crow[first + i + 1])
                a, b = zero, zero
                while k + 1 < last:
                    a = fma(splat(at(values, k)), load(panel, np.intp(at(col, k)) * 16), a)
                    b = fma(splat(at(values, k + 1)), load(panel, np.intp(at(col, k + 1)) * 16), b)
                    k += 2
                if k < last:
                    a = fma(splat(at(values, k)), load(panel, np.intp(at(col, k)) * 16), a)
                store(tile, i * 16, add(a, b))
            move(tile, 0, 16, n, batch, out, first, rows, n, spare)


@kernel
def _sum_four(values, crow, col, panel, y, n_chunks):
    """The same for up to four examples, 4 lanes wide: without AVX-512 a vector of 16 is two or four registers.

    Two nonzeros a turn: rows at low density are too short for four (0.7 to 0.9 times as fast).
    """
    batch, rows = y.shape
    out = y.reshape(-1)
    for chunk in prange(n_chunks):
        for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
            k, last = np.intp(crow[row]), np.intp(crow[row + 1])
            a = b = c = d = e = f = g = h = values.dtype.type(0)
            while k + 1 < last:
                j, v = 4 * np.intp(at(col, k)), at(values, k)
                a, b = a + v * at(panel, j), b + v * at(panel, j + 1)
                c, d = c + v * at(panel, j + 2), d + v * at(panel, j + 3)
                j, v = 4 * np.intp(at(col, k + 1)), at(values, k + 1)
                e, f = e + v * at(panel, j), f + v * at(panel, j + 1)
                g, h = g + v * at(panel, j + 2), h + v * at(panel, j + 3)
                k += 2
            if k < last:
                j, v = 4 * np.intp(at(col, k)), at(values, k)
                a, b = a + v * at(panel, j), b + v * at(panel, j + 1)
                c, d = c + v * at(panel, j + 2), d + v * at(panel, j + 3)
            put(out, row, a + e)
            if batch > 1:
                put(out, rows + row, b + f)
            if batch > 2:
                put(out, 2 * rows + row, c + g)
            if batch > 3:
                put(out, 3 * rows + row, d + h)


@kernel
def _add_rows(values, crow, col, panel, cols, sums, n_chunks):
    """sums[chunk, 16 * column + e] += value * dy[e, row]; ``panel`` holds dy[:, row] from 16 * row on."""
    for chunk in prange(n_chunks):
        total = sums[chunk]
        total[: 16 * cols] = 0
        for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
            y = load(panel, row * 16)
            for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
                j = np.intp(at(col, k)) * 16
                store(total, j, fma(splat(at(values, k)), y, load(total, j)))


@device_function
def dot(values, start, col, first, last, x):
    """Sum of values[start + k] * x[col[k]], four sums at a time."""
    k = first
    a = b = c = d = values.dtype.type(0)
    while k + 3 < last:
        a += at(values, start + k) * at(x, np.intp(at(col, k)))
        b += at(values, start + k + 1) * at(x, np.intp(at(col, k + 1)))
        c += at(values, start + k + 2) * at(x, np.intp(at(col, k + 2)))
        d += at(values, start + k + 3) * at(x, np.intp(at(col, k + 3)))
        k += 4
    while k < last:
        a += at(values, start + k) * at(x, np.intp(at(col, k)))
        k += 1
    return (a + b) + (c + d)


@kernel
def _dot_one(values, crow, col, x, y, n_chunks):
    for chunk in prange(n_chunks):
        for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
            put(y, row, dot(values, 0, col, np.intp(crow[row]), np.intp(crow[row + 1]), x))


@kernel
def _add_one(values, crow, col, dy, sums, n_chunks):
    for chunk in prange(n_chunks):
        total = sums[chunk]
        for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
            y = dy[row]
            for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
                j = np.intp(at(col, k))
                put(total, j, at(total, j) + at(values, k) * y)


@kernel
def _outer_one(crow, col, dy, x, out, n_chunks):
    for chunk in prange(n_chunks):
        for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
            for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
                out[k] = dy[row] * at(x, np.intp(at(col, k)))
