"""Products for a few examples, where lanes of a batch would be empty: vectors run along the columns of W instead.

From a bitmap 16 positions of a row are expanded (or computed, and compressed) at a time for every example; CSR has
its own forms (`few_csr`), and ``spmm`` one for both encodings (`few_spmm`) and one for a single example from a bitmap
(`few_one`). Results of ``spmm_t`` depend on the number of threads (threads take rows and have a dX each, added in their
order), the others do not.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba import few_csr, few_one, few_spmm
from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import TYPES, workspace
from sparsecore.backends.numba.panels import split_rows
from sparsecore.backends.numba.simd import (
    at,
    bits,
    compress,
    count,
    expand,
    first_lanes,
    fma,
    load,
    prefetch,
    splat,
    store,
    store_masked,
    transpose_part,
    where,
    zeros,
)

_AHEAD = 1024  # values: 256 took 1.2 times as long at density 0.5


def spmm(values, crow, col, x, y, n_chunks):
    if col is None and len(x) == 1:
        few_one.spmm(values, crow, x[0], y[0], n_chunks)
    else:
        few_spmm.spmm(values, crow, col, x, y, n_chunks)


def spmm_t(values, crow, col, dy, dx, n_chunks):
    if col is not None:
        few_csr.spmm_t(values, crow, col, dy, dx, n_chunks)
        return
    batch, cols = dx.shape
    wide = -(-cols // 16) * 16
    scratch = workspace("sums", n_chunks, batch * wide, TYPES[dx.dtype])
    _add_expanded(values, crow, dy, scratch, wide, n_chunks)
    sums = scratch[:, : batch * wide].reshape(n_chunks, wide // 16, batch, 16)
    total = sums[0]
    for part in range(1, n_chunks):
        total += sums[part]
    np.copyto(dx, total.transpose(1, 0, 2).reshape(batch, wide)[:, :cols])


def sddmm(crow, col, dy, x, out, n_chunks):
    if col is None:
        tiles = workspace("tiles", n_chunks, 16 * 16, TYPES[x.dtype])
        _outer(crow, dy, _widened(x, len(x)), tiles, out, n_chunks)
    else:
        few_csr.sddmm(crow, col, dy, x, out, n_chunks)


def _widened(x, rows):
    """x with zeros up to a multiple of 64 columns and to ``rows`` rows."""
    wide = _on_lines((rows, -(-x.shape[1] // 64) * 64), x.dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide


def _on_lines(shape, dtype):
    """Zeros that begin on a cache line (torch's memory does, numpy's not): from a vector across two of them a product
    at density 0.1 took 1.1 times as long.
    """
    return torch.zeros(shape, dtype=TYPES[dtype], device="cpu").numpy()


# ---------------------------------------------------------------- bitmap
# Places that are not stored are masked, not multiplied by 0: infinity times 0 would be NaN.


@kernel
def _add_expanded(values, crow, dy, sums, wide, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    masks, words = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
    batch, rows = dy.shape
    source = dy.reshape(-1)
    total = sums[chunk]
    total[: batch * wide] = 0
    for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
        k = np.intp(crow[row, 0])
        word = row * words + 2
        for j in range(0, wide, 16):
            m = bits(masks, word)
            prefetch(values, k + _AHEAD)
            w = expand(values, k, m)
            # Examples side by side: with a row of sums for each two threads took as long as one (docs/kernels.md).
            for e in range(batch):
                t = j * batch + 16 * e
                v = load(total, t)
                store(total, t, where(m, fma(w, splat(at(source, e * rows + row)), v), v))
            k += count(m)
            word += 1


@kernel
def _outer(crow, dy, x, tiles, out, n_chunks, chunk):
    """out = sum over examples of dy[row] * x[columns], 64 columns at a time, for up to 16 examples."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    masks, words = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
    batch, wide = x.shape
    rows = dy.shape[1]
    source, flat = dy.reshape(-1), x.reshape(-1)
    tile = tiles[chunk]
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, 16):
        n = min(16, end - first)
        transpose_part(source, first, rows, batch, n, tile, 0, 16, 16)
        for i in range(n):
            k = np.intp(crow[first + i, 0])
            word = (first + i) * words + 2
            for j in range(0, wide, 64):
                a, b, c, d = zeros(x), zeros(x), zeros(x), zeros(x)
                for e in range(batch):
                    y = splat(at(tile, i * 16 + e))
                    t = e * wide + j
                    a, b = fma(y, load(flat, t), a), fma(y, load(flat, t + 16), b)
                    c, d = fma(y, load(flat, t + 32), c), fma(y, load(flat, t + 48), d)
                k = _keep(a, bits(masks, word), out, k)
                k = _keep(b, bits(masks, word + 1), out, k)
                if j + 32 < 16 * (words - 2):
                    k = _keep(c, bits(masks, word + 2), out, k)
                    k = _keep(d, bits(masks, word + 3), out, k)
                word += 4


@device_function
def _keep(v, mask, out, k):
    store_masked(out, k, compress(v, mask), first_lanes(count(mask)))
    return k + count(mask)
