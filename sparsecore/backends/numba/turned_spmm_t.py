"""``dX = dY W`` for large batches: W is turned column-major, a chunk of rows at a time, in scratch.

Each column of a chunk is then a sum of panel rows of dY that stays in registers, as in ``spmm``; without turning, every
nonzero loads and stores a panel row of dX (`panel_spmm_t`), and a processor that stores half a vector a cycle waits for
its stores. Turning costs the same for any batch, and pays for large ones (`linear._TURN`). Threads have rows and sums
of their own, as in `panel_spmm_t`: results depend on their number.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import kernel
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.panel_spmm import block_of
from sparsecore.backends.numba.panel_spmm_t import add_and_unpack, tile_of
from sparsecore.backends.numba.panels import (
    index_space,
    lanes_of,
    localise,
    padded,
    parts,
    pointer,
    row_of_16,
    row_of_32,
    row_of_64,
    row_of_128,
    split_rows,
    width_of,
)
from sparsecore.backends.numba.simd import at, put

MOST_COLUMNS = 1 << 16  # of W: a column is a uint16
_POSITIONS = 1 << 21  # of a chunk, at most
_NOTHING = 128  # numbers of a panel row of zeros


def spmm_t(values, crow, col, dy, dx, n_chunks):
    batch, cols = dx.shape
    dtype = torch.from_numpy(dy).dtype
    width = width_of(batch)
    height = max(1, min(block_of(width, values.shape[0] / (cols * dy.shape[1]), 0), _POSITIONS // cols))
    tiles = workspace("tiles", n_chunks, height * width + _NOTHING, dtype)
    local, segment = index_space(n_chunks, height, cols, MOST_COLUMNS)
    turned = workspace("turned", n_chunks, height * cols + 16, dtype)
    rows = workspace("turned rows", n_chunks, height * cols + 16, torch.int16).view(np.uint16)
    ends = workspace("turned ends", n_chunks, cols + 1, torch.int32)
    for part in parts(batch, cols):
        sums = workspace("sums", n_chunks, padded(len(dy[part])) * cols, dtype)
        scratch = (tiles, local, segment, turned, rows, ends, sums)
        _spmm_t(values, crow, col, dy[part], cols, height, *scratch, n_chunks)
        add_and_unpack(sums, dx[part], n_chunks)


@kernel
def _spmm_t(
    values,
    crow,
    col,
    dy,
    cols,
    height,
    tiles,
    locals_,
    segments,
    turneds,
    rows_,
    ends_,
    sums,
    n_chunks,
    chunk,
):
    batch = dy.shape[0]
    local, segment, turned, row_of, ends = (
        locals_[chunk], segments[chunk], turneds[chunk], rows_[chunk], ends_[chunk]
    )  # fmt: skip
    total, tile = sums[chunk], tiles[chunk]
    zero = tile.shape[0] - _NOTHING
    tile[zero : zero + _NOTHING] = 0
    total[:] = 0
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, height):
        last = min(first + height, end)
        localise(crow, col, first, last, cols, 65536, height, local, segment)
        start, stored = pointer(crow, first), pointer(crow, last) - pointer(crow, first)
        ends[:] = 0
        for k in range(stored):
            j = np.intp(at(local, k)) + 1
            put(ends, j, np.int32(at(ends, j) + 1))
        for j in range(1, cols + 1):
            ends[j] += ends[j - 1]
        for i in range(last - first):
            for k in range(np.intp(at(segment, i)), np.intp(at(segment, height + i))):
                j = np.intp(at(local, k))
                place = np.intp(at(ends, j))
                put(ends, j, np.int32(place + 1))
                put(turned, place, at(values, start + k))
                put(row_of, place, np.uint16(i))
        for p in range(0, batch, 128):
            lanes = lanes_of(batch - p)
            tile_of(dy, p, first, last, tile, lanes)
            k0, t = np.intp(0), p * cols
            for j in range(cols):
                k1 = np.intp(at(ends, j))
                if lanes == 128:
                    row_of_128(turned, 0, 64, row_of, k0, k1, tile, 0, zero, total, t, True)
                elif lanes == 64:
                    row_of_64(turned, 0, 64, row_of, k0, k1, tile, 0, zero, total, t, True)
                elif lanes == 32:
                    row_of_32(turned, 0, 64, row_of, k0, k1, tile, 0, zero, total, t, True)
                else:
                    row_of_16(turned, 0, 64, row_of, k0, k1, tile, 0, zero, total, t, True)
                k0, t = k1, t + lanes
