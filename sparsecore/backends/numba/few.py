"""Products for a few examples, where lanes of a batch would be empty: vectors run along the columns of W instead.

From a bitmap 16 positions of a row are expanded (or computed, and compressed) at a time for every example; CSR has
its own forms (`few_csr`), and ``spmm`` one for both encodings (`few_spmm`) but for one example from a bitmap. Results
of ``spmm_t`` depend on the number of threads (threads take rows and have a dX each, added in their order), the others
do not.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from sparsecore.backends.numba import few_csr, few_spmm
from sparsecore.backends.numba.jit import device_function, kernel
from sparsecore.backends.numba.memory import TYPES, workspace
from sparsecore.backends.numba.panels import split_rows
from sparsecore.backends.numba.simd import (
    LANES,
    add,
    at,
    bits,
    bits64,
    compress,
    count,
    expand,
    first_lanes,
    fma,
    horizontal_sum,
    load,
    load_masked,
    prefetch,
    put,
    splat,
    spread,
    store,
    store_masked,
    transpose_part,
    where,
    zeros,
)

_AHEAD = 1024  # values: 256 took 1.2 times as long at density 0.5


def spmm(values, crow, col, x, y, n_chunks):
    if col is None and len(x) == 1:
        _expand_one(values, crow, x[0], y[0], n_chunks)
    else:
        few_spmm.spmm(values, crow, col, x, y, n_chunks)


def spmm_t(values, crow, col, dy, dx, n_chunks):
    if col is not None:
        few_csr.spmm_t(values, crow, col, dy, dx, n_chunks)
        return
    batch, cols = dx.shape
    wide = -(-cols // 16) * 16
    sums = _on_lines((n_chunks, batch, wide), dx.dtype)
    _add_expanded(values, crow, dy, sums, n_chunks)
    np.copyto(dx, sums[0, :, :cols])
    for part in range(1, n_chunks):
        dx += sums[part, :, :cols]


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
def _expand_one(values, crow, x, y, n_chunks):
    words, wide, rows = crow.reshape(-1), crow.shape[1], crow.shape[0] - 1
    inner = rows  # up to here a vector that begins in a row lies within the values
    while inner > 0 and crow[inner, 0] + LANES > len(values):
        inner -= 1
    for chunk in prange(n_chunks):
        end = split_rows(crow, n_chunks, chunk + 1)
        for row in range(split_rows(crow, n_chunks, chunk), min(inner, end)):
            put(y, row, _expanded_dot(values, words, wide, row, x, _loaded))
        for row in range(max(inner, split_rows(crow, n_chunks, chunk)), end):
            put(y, row, _expanded_dot(values, words, wide, row, x, _masked))


@device_function
def _loaded(values, k, mask):
    """`expand` is slow when it reads memory itself, and this is, when the load is masked."""
    return spread(load(values, k), mask)


@device_function
def _masked(values, k, mask):
    return expand(values, k, mask)


@device_function
def _expanded_dot(values, words, wide, row, x, following):
    """A row of W times x."""
    place = row * wide
    k = np.intp(at(words, place))
    a, b, c, d = zeros(x), zeros(x), zeros(x), zeros(x)
    for j in range(0, len(x), 64):
        m = bits64(words, place + 1 + j // 32)
        if j // 32 + 2 >= wide:  # the row's last 64 bits reach into the next row's pointer
            m &= np.uint64(0xFFFFFFFF)
        m0, m1 = np.uint16(m), np.uint16(m >> np.uint64(16))
        m2, m3 = np.uint16(m >> np.uint64(32)), np.uint16(m >> np.uint64(48))
        k2 = k + count(np.uint32(m))
        prefetch(values, k + _AHEAD)
        prefetch(values, k + _AHEAD + 16)
        a = fma(following(values, k, m0), load_masked(x, j, m0), a)
        b = fma(following(values, k + count(m0), m1), load_masked(x, j + 16, m1), b)
        c = fma(following(values, k2, m2), load_masked(x, j + 32, m2), c)
        d = fma(following(values, k2 + count(m2), m3), load_masked(x, j + 48, m3), d)
        k += count(m)
    return horizontal_sum(add(add(a, b), add(c, d)))


@kernel
def _add_expanded(values, crow, dy, sums, n_chunks):
    masks, words = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
    batch, wide = sums.shape[1:]
    rows = dy.shape[1]
    source = dy.reshape(-1)
    for chunk in prange(n_chunks):
        total = sums[chunk].reshape(-1)
        for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
            k = np.intp(crow[row, 0])
            word = row * words + 2
            for j in range(0, wide, 16):
                m = bits(masks, word)
                prefetch(values, k + _AHEAD)
                w = expand(values, k, m)
                for e in range(batch):
                    t = e * wide + j
                    v = load(total, t)
                    store(total, t, where(m, fma(w, splat(at(source, e * rows + row)), v), v))
                k += count(m)
                word += 1


@kernel
def _outer(crow, dy, x, tiles, out, n_chunks):
    """out = sum over examples of dy[row] * x[columns], 64 columns at a time, for up to 16 examples."""
    masks, words = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
    batch, wide = x.shape
    rows = dy.shape[1]
    source, flat = dy.reshape(-1), x.reshape(-1)
    for chunk in prange(n_chunks):
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
