"""Products of a sparse weight W (rows = outputs, cols = inputs) with dense activations.

Batch-major activations are packed, a tile of the batch at a time, into feature-major panels, so that every nonzero
is one multiply-add over contiguous lanes of the batch. Sums over a row run in column order whatever the number of
threads: results do not depend on it.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from sparsecore.backends.numba.jit import array, device_function, kernel, split, threads
from sparsecore.backends.numba.simd import LANES, add, fma, horizontal_sum, load, mul, splat, store, zeros
from sparsecore.encoding import decode

__all__ = ["sddmm", "spmm", "spmm_t"]

_LANES = 64  # batch lanes of a panel: 600 inputs x 64 lanes x 4 bytes stay in a 1 MiB L2 cache
_ROWS = 16  # output rows that are buffered before they are written batch-major


def spmm(values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    if col is None:
        crow, col = decode(crow, x.shape[1])
    batch, n_out = x.shape[0], crow.numel() - 1
    y = torch.empty((batch, n_out), dtype=x.dtype)
    n = threads(batch * values.numel())
    if batch == 1:
        _spmv(array(values), array(crow), array(col), array(x)[0], y.numpy()[0], n)
    elif batch:
        _spmm(array(values), array(crow), array(col), array(x), y.numpy(), n)
    return y


def spmm_t(values: Tensor, crow: Tensor, col: Tensor | None, dy: Tensor, n_cols: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    if col is None:
        crow, col = decode(crow, n_cols)
    batch = dy.shape[0]
    dx = torch.empty((batch, n_cols), dtype=dy.dtype)
    if batch:
        n = threads(batch * values.numel())
        lanes = min(_LANES, -(-batch // (LANES * n)) * LANES)
        _spmm_t(array(values), array(crow), array(col), array(dy), dx.numpy(), lanes, n)
    return dx


def sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    if col is None:
        crow, col = decode(crow, x.shape[1])
    out = torch.zeros(col.numel(), dtype=x.dtype)
    if x.shape[0]:
        n = threads(x.shape[0] * col.numel())
        _sddmm(array(crow), array(col), array(dy), array(x), out.numpy(), n)
    return out


@device_function
def _pack(x, start, lanes, padded, panel, n_chunks, chunk):
    """Columns of one chunk of ``x[start : start + lanes]`` -> rows of the panel, padded with zeros."""
    n = x.shape[1]
    for j0 in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks, 16):
        j1 = min(j0 + 16, n * (chunk + 1) // n_chunks)
        for lane in range(lanes):
            for j in range(j0, j1):
                panel[j, lane] = x[start + lane, j]
        for lane in range(lanes, padded):
            for j in range(j0, j1):
                panel[j, lane] = 0


@kernel
def _spmv(values, crow, col, x, y, n_chunks):
    for chunk in prange(n_chunks):
        for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
            total = values.dtype.type(0)
            for k in range(crow[i], crow[i + 1]):
                total += values[k] * x[col[k]]
            y[i] = total


@kernel
def _spmm(values, crow, col, x, y, n_chunks):
    batch = x.shape[0]
    width = min(_LANES, -(-batch // LANES) * LANES)
    panel = np.empty((x.shape[1], width), x.dtype)
    for start in range(0, batch, _LANES):
        lanes = min(_LANES, batch - start)
        vectors = -(-lanes // LANES)
        for chunk in prange(n_chunks):
            _pack(x, start, lanes, vectors * LANES, panel, n_chunks, chunk)
        for chunk in prange(n_chunks):
            tile = np.empty((_ROWS, width), x.dtype)
            end = split(crow, n_chunks, chunk + 1)
            for i0 in range(split(crow, n_chunks, chunk), end, _ROWS):
                i1 = min(i0 + _ROWS, end)
                for i in range(i0, i1):
                    if vectors == 4:
                        _row_of_four(values, col, crow[i], crow[i + 1], panel, tile, i - i0)
                    else:
                        for v in range(vectors):
                            _row_of_one(values, col, crow[i], crow[i + 1], panel, v * LANES, tile, i - i0)
                for lane in range(lanes):
                    for i in range(i0, i1):
                        y[start + lane, i] = tile[i - i0, lane]


@device_function
def _row_of_four(values, col, first, last, panel, tile, r):
    """tile[r] = sum over a row's nonzeros of value * panel[column], 64 lanes: four sums stay in registers."""
    a0, a1, a2, a3 = zeros(panel), zeros(panel), zeros(panel), zeros(panel)
    for k in range(first, last):
        w = splat(values[k])
        at = np.intp(col[k]) * 64
        a0 = fma(w, load(panel, at), a0)
        a1 = fma(w, load(panel, at + 16), a1)
        a2 = fma(w, load(panel, at + 32), a2)
        a3 = fma(w, load(panel, at + 48), a3)
    store(tile, r * 64, a0)
    store(tile, r * 64 + 16, a1)
    store(tile, r * 64 + 32, a2)
    store(tile, r * 64 + 48, a3)


@device_function
def _row_of_one(values, col, first, last, panel, lane, tile, r):
    """The same for the 16 lanes from ``lane``; four sums, so that multiply-adds do not wait for each other."""
    width = panel.shape[1]
    a0, a1, a2, a3 = zeros(panel), zeros(panel), zeros(panel), zeros(panel)
    whole = first + (last - first) // 4 * 4
    for k in range(first, whole, 4):
        a0 = fma(splat(values[k]), load(panel, np.intp(col[k]) * width + lane), a0)
        a1 = fma(splat(values[k + 1]), load(panel, np.intp(col[k + 1]) * width + lane), a1)
        a2 = fma(splat(values[k + 2]), load(panel, np.intp(col[k + 2]) * width + lane), a2)
        a3 = fma(splat(values[k + 3]), load(panel, np.intp(col[k + 3]) * width + lane), a3)
    for k in range(whole, last):
        a0 = fma(splat(values[k]), load(panel, np.intp(col[k]) * width + lane), a0)
    store(tile, r * width + lane, add(add(a0, a1), add(a2, a3)))


@kernel
def _spmm_t(values, crow, col, dy, dx, lanes_per_tile, n_chunks):
    # Parallel over the batch: threads never write to the same place and no transposed index is kept.
    batch, n_out, n_in = dy.shape[0], dy.shape[1], dx.shape[1]
    n_tiles = -(-batch // lanes_per_tile)
    for chunk in prange(n_chunks):
        panel = np.empty((n_in, lanes_per_tile), dy.dtype)
        rows = np.zeros((_ROWS, lanes_per_tile), dy.dtype)
        for t in range(n_tiles * chunk // n_chunks, n_tiles * (chunk + 1) // n_chunks):
            start = t * lanes_per_tile
            lanes = min(lanes_per_tile, batch - start)
            panel[:] = 0
            for i0 in range(0, n_out, _ROWS):
                i1 = min(i0 + _ROWS, n_out)
                for lane in range(lanes):
                    for i in range(i0, i1):
                        rows[i - i0, lane] = dy[start + lane, i]
                for i in range(i0, i1):
                    if lanes_per_tile == 64:
                        _scatter_four(values, col, crow[i], crow[i + 1], rows, i - i0, panel)
                    else:
                        for lane in range(0, lanes, LANES):
                            _scatter_one(values, col, crow[i], crow[i + 1], rows, i - i0, lane, panel)
            for j0 in range(0, n_in, 16):
                j1 = min(j0 + 16, n_in)
                for lane in range(lanes):
                    for j in range(j0, j1):
                        dx[start + lane, j] = panel[j, lane]


@device_function
def _scatter_four(values, col, first, last, rows, r, panel):
    """panel[column] += value * rows[r] over a row's nonzeros, 64 lanes."""
    y0, y1 = load(rows, r * 64), load(rows, r * 64 + 16)
    y2, y3 = load(rows, r * 64 + 32), load(rows, r * 64 + 48)
    for k in range(first, last):
        w = splat(values[k])
        at = np.intp(col[k]) * 64
        store(panel, at, fma(w, y0, load(panel, at)))
        store(panel, at + 16, fma(w, y1, load(panel, at + 16)))
        store(panel, at + 32, fma(w, y2, load(panel, at + 32)))
        store(panel, at + 48, fma(w, y3, load(panel, at + 48)))


@device_function
def _scatter_one(values, col, first, last, rows, r, lane, panel):
    width = panel.shape[1]
    y0 = load(rows, r * width + lane)
    for k in range(first, last):
        at = np.intp(col[k]) * width + lane
        store(panel, at, fma(splat(values[k]), y0, load(panel, at)))


@kernel
def _sddmm(crow, col, dy, x, out, n_chunks):
    batch = x.shape[0]
    width = min(_LANES, -(-batch // LANES) * LANES)
    panel_x = np.empty((x.shape[1], width), x.dtype)
    panel_y = np.empty((dy.shape[1], width), x.dtype)
    for start in range(0, batch, _LANES):
        lanes = min(_LANES, batch - start)
        vectors = -(-lanes // LANES)
        for chunk in prange(n_chunks):
            _pack(x, start, lanes, vectors * LANES, panel_x, n_chunks, chunk)
            _pack(dy, start, lanes, vectors * LANES, panel_y, n_chunks, chunk)
        for chunk in prange(n_chunks):
            for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
                if vectors == 4:
                    _dots_of_four(col, crow[i], crow[i + 1], panel_y, i, panel_x, out)
                else:
                    for lane in range(0, vectors * LANES, LANES):
                        _dots_of_one(col, crow[i], crow[i + 1], panel_y, i, panel_x, lane, out)


@device_function
def _dots_of_four(col, first, last, panel_y, i, panel_x, out):
    """out[k] += panel_y[i] . panel_x[column] over a row's nonzeros, 64 lanes."""
    y0, y1 = load(panel_y, i * 64), load(panel_y, i * 64 + 16)
    y2, y3 = load(panel_y, i * 64 + 32), load(panel_y, i * 64 + 48)
    for k in range(first, last):
        at = np.intp(col[k]) * 64
        low = fma(y0, load(panel_x, at), mul(y1, load(panel_x, at + 16)))
        high = fma(y2, load(panel_x, at + 32), mul(y3, load(panel_x, at + 48)))
        out[k] += horizontal_sum(add(low, high))


@device_function
def _dots_of_one(col, first, last, panel_y, i, panel_x, lane, out):
    width = panel_x.shape[1]
    y0 = load(panel_y, i * width + lane)
    for k in range(first, last):
        out[k] += horizontal_sum(mul(y0, load(panel_x, np.intp(col[k]) * width + lane)))
