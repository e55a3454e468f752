"""Products through torch's dense ones, a tile of W at a time: for dense weights and large batches.

A tile is expanded into scratch of at most 4 MiB, and at most half of W: it is never expanded as a whole.
``spmm_t`` adds the products of the tiles in the order of their rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from numba.extending import overload

from sparsecore.backends.numba.jit import kernel
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.panels import pointer
from sparsecore.backends.numba.simd import (
    at,
    bits,
    compress,
    count,
    first_lanes,
    load,
    load_masked,
    prefetch,
    put,
    spread,
    store,
    store_masked,
)

# Every tile costs a switch between numba's parallel regions and torch's: half as many positions are up to 8 % slower at
# 600 x 20000 and 2000 x 2000, twice as many are slower at 20000 x 600 (Zen 4, one and two threads).
_POSITIONS = 1 << 20  # of a tile
_COLS = 2048  # of a tile, at most; a multiple of 16


def _parts(size: int, longest: int, unit: int) -> list[tuple[int, int]]:
    """Parts of equal size, a multiple of the unit."""
    n = -(-size // longest)
    step = -(-size // (n * unit)) * unit
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _tiles(rows: int, cols: int, dtype: torch.dtype):
    """First and last row, first and last column and scratch of every tile; row blocks outside, so that a row's
    columns are read in order: ``places`` are those reached."""
    across = _parts(cols, _COLS, 16)
    down = _parts(rows, max(1, min(_POSITIONS // across[0][1], -(-rows // 2))), 1)
    scratch = workspace("tile", 1, down[0][1] * across[0][1], dtype)[0]
    places = workspace("places", 1, down[0][1], torch.int64)[0]
    for top, bottom in down:
        for left, right in across:
            tile = scratch[: (bottom - top) * (right - left)].reshape(bottom - top, right - left)
            yield top, bottom, left, right, tile, places


def spmm(values, crow, col, x, y, n_chunks):
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    rows, cols = y.shape[1], x.shape[1]
    for top, bottom, left, right, tile, places in _tiles(rows, cols, x.dtype):
        _spread(values, crow, col, top, left, tile, places, n_chunks)
        part, out = x[:, left:right], y[:, top:bottom]
        if left == 0:
            torch.mm(part, torch.from_numpy(tile).t(), out=out)
        else:
            out.addmm_(part, torch.from_numpy(tile).t())


def spmm_t(values, crow, col, dy, dx, n_chunks):
    dy, dx = torch.from_numpy(dy), torch.from_numpy(dx)
    rows, cols = dy.shape[1], dx.shape[1]
    for top, bottom, left, right, tile, places in _tiles(rows, cols, dy.dtype):
        _spread(values, crow, col, top, left, tile, places, n_chunks)
        part, out = dy[:, top:bottom], dx[:, left:right]
        if top == 0:
            torch.mm(part, torch.from_numpy(tile), out=out)
        else:
            out.addmm_(part, torch.from_numpy(tile))


def sddmm(crow, col, dy, x, out, n_chunks):
    dy, x = torch.from_numpy(dy), torch.from_numpy(x)
    rows, cols = dy.shape[1], x.shape[1]
    for top, bottom, left, right, tile, places in _tiles(rows, cols, x.dtype):
        torch.mm(dy[:, top:bottom].t(), x[:, left:right], out=torch.from_numpy(tile))
        _collect(crow, col, top, left, tile, places, out, n_chunks)


@kernel
def _spread(values, crow, col, top, left, tile, places, n_chunks):
    """Columns ``left`` .. of rows ``top`` .. of W, with the zeros, to the tile."""
    rows, wide = tile.shape
    flat = tile.reshape(-1)
    for chunk in prange(n_chunks):
        for i in range(rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks):
            k = pointer(crow, top + i) if left == 0 else places[i]
            ahead = (pointer(crow, top + i + 1) if left == 0 else places[min(i + 1, rows - 1)]) - k
            places[i] = spread_row(values, crow, col, top + i, left, wide, k, ahead, flat, i * wide)


@kernel
def _collect(crow, col, top, left, tile, places, out, n_chunks):
    """The tile's numbers at the nonzeros of W to their places in ``out``."""
    rows, wide = tile.shape
    flat = tile.reshape(-1)
    for chunk in prange(n_chunks):
        for i in range(rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks):
            k = pointer(crow, top + i) if left == 0 else places[i]
            ahead = (pointer(crow, top + i + 1) if left == 0 else places[min(i + 1, rows - 1)]) - k
            places[i] = collect_row(crow, col, top + i, left, wide, k, ahead, flat, i * wide, out)


def spread_row(values, crow, col, row, left, wide, k, ahead, out, place):
    """Columns left .. left + wide of a row, whose first nonzero there is k, to ``out[place:]``: the k after them."""
    raise NotImplementedError


def collect_row(crow, col, row, left, wide, k, ahead, source, place, out):
    """The numbers of ``source[place:]`` at those nonzeros to ``out[k:]``: the k after them."""
    raise NotImplementedError


@overload(spread_row)
def _spread_row(values, crow, col, row, left, wide, k, ahead, out, place):
    def bitmap(values, crow, col, row, left, wide, k, ahead, out, place):
        masks = crow.view(np.uint16).reshape(-1)
        word = row * 2 * crow.shape[1] + 2 + left // 16
        for j in range(0, wide // 16 * 16, 16):
            mask = bits(masks, word)
            n = count(mask)
            store(out, place + j, spread(load_masked(values, k, first_lanes(n)), mask))
            k += n
            word += 1
        if wide % 16:
            mask = bits(masks, word)
            n = count(mask)
            v = spread(load_masked(values, k, first_lanes(n)), mask)
            store_masked(out, place + wide // 16 * 16, v, first_lanes(wide % 16))
            k += n
        return k

    def csr(values, crow, col, row, left, wide, k, ahead, out, place):
        out[place : place + wide] = 0
        end, beyond, start = np.intp(crow[row + 1]), left + wide, place - left
        while k + 15 < end and np.intp(at(col, k + 15)) < beyond:
            prefetch(col, k + ahead)
            prefetch(values, k + ahead)
            for n in range(k, k + 16):
                put(out, start + np.intp(at(col, n)), at(values, n))
            k += 16
        while k < end and np.intp(at(col, k)) < beyond:
            put(out, start + np.intp(at(col, k)), at(values, k))
            k += 1
        return k

    return bitmap if crow.ndim == 2 else csr


@overload(collect_row)
def _collect_row(crow, col, row, left, wide, k, ahead, source, place, out):
    def bitmap(crow, col, row, left, wide, k, ahead, source, place, out):
        masks = crow.view(np.uint16).reshape(-1)
        word = row * 2 * crow.shape[1] + 2 + left // 16
        # A whole vector where the row has room for it: what is too much is overwritten by the columns to the right.
        end = pointer(crow, row + 1) - 16
        for j in range(0, wide // 16 * 16, 16):
            mask = bits(masks, word)
            v = compress(load(source, place + j), mask)
            if k <= end:
                store(out, k, v)
            else:
                store_masked(out, k, v, first_lanes(count(mask)))
            k += count(mask)
            word += 1
        if wide % 16:
            mask = bits(masks, word)
            v = load_masked(source, place + wide // 16 * 16, first_lanes(wide % 16))
            store_masked(out, k, compress(v, mask), first_lanes(count(mask)))
            k += count(mask)
        return k

    def csr(crow, col, row, left, wide, k, ahead, source, place, out):
        end, beyond, start = np.intp(crow[row + 1]), left + wide, place - left
        while k + 15 < end and np.intp(at(col, k + 15)) < beyond:
            prefetch(col, k + ahead)
            prefetch(out, k + ahead)
            for n in range(k, k + 16):
                put(out, n, at(source, start + np.intp(at(col, n))))
            k += 16
        while k < end and np.intp(at(col, k)) < beyond:
            put(out, k, at(source, start + np.intp(at(col, k))))
            k += 1
        return k

    return bitmap if crow.ndim == 2 else csr
