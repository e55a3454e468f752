"""``dX = dY W`` for large batches: W is turned column-major, a chunk of rows at a time, in scratch.

Each column of a chunk is then a sum of panel rows of dY that stays in registers, as in ``spmm``; without turning, every
nonzero loads and stores a panel row of dX (`panel_spmm_t`), and a processor that stores half a vector a cycle waits for
its stores. Turning costs the same for any batch, and pays for all but small ones (`linear._TURN`). Threads have rows
and sums of their own, as in `panel_spmm_t`: results depend on their number.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.packing import lanes_of, padded, parts, width_of
from sparsecore.backends.numba.panel_spmm import block_of
from sparsecore.backends.numba.panel_spmm_t import add_and_unpack, tile_of
from sparsecore.backends.numba.panels import pointer, row_of_16, row_of_32, row_of_64, row_of_128, split_rows
from sparsecore.backends.numba.simd import at, prefetch
from sparsecore.backends.numba.turning import turn, turned

_POSITIONS = 1 << 21  # of a chunk, at most
_NOTHING = 128  # numbers of a panel row of zeros


def spmm_t(values, crow, col, dy, dx, n_chunks):
    batch, cols = dx.shape
    dtype = torch.from_numpy(dy).dtype
    width = width_of(batch)
    height = max(1, min(block_of(width, values.shape[0] / (cols * dy.shape[1]), 0), _POSITIONS // cols))
    if height > 16:
        height -= height % 16
    tiles = workspace("tiles", n_chunks, height * width + _NOTHING, dtype)
    for part in parts(batch, cols):
        sums = workspace("sums", n_chunks, padded(len(dy[part])) * cols, dtype)
        scratch = turned(n_chunks, height, cols, dy.dtype)
        _spmm_t(values, crow, col, dy[part], cols, height, tiles, scratch, sums, n_chunks)
        add_and_unpack(sums, dx[part], n_chunks)


@kernel
def _spmm_t(values, crow, col, dy, cols, height, tiles, scratch, sums, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch = dy.shape[0]
    lists, rows, ends = scratch.values[chunk], scratch.rows[chunk], scratch.ends[chunk]
    local, segment = scratch.local[chunk], scratch.segment[chunk]
    listed, listed_rows = scratch.listed[chunk], scratch.listed_rows[chunk]
    total, tile = sums[chunk], tiles[chunk]
    zero = tile.shape[0] - _NOTHING
    tile[zero : zero + _NOTHING] = 0
    total[:] = 0
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, height):
        last = min(first + height, end)
        upcoming = pointer(crow, last)
        turn(
            values, crow, col, first, last, cols, height, lists, rows, ends, local, segment, listed, listed_rows
        )  # fmt: skip
        for p in range(0, batch, 128):
            lanes = lanes_of(batch - p)
            tile_of(dy, p, first, last, tile, lanes)
            k0, t = np.intp(0), p * cols
            for j in range(cols):
                k1 = np.intp(at(ends, j))
                if p == 0:  # as many of the values that come next
                    for k in range(k0, k1, 16):
                        prefetch(values, upcoming + k)
                if lanes == 128:
                    row_of_128(lists, 0, 64, rows, k0, k1, tile, 0, zero, total, t, True)
                elif lanes == 64:
                    row_of_64(lists, 0, 64, rows, k0, k1, tile, 0, zero, total, t, True)
                elif lanes == 32:
                    row_of_32(lists, 0, 64, rows, k0, k1, tile, 0, zero, total, t, True)
                else:
                    row_of_16(lists, 0, 64, rows, k0, k1, tile, 0, zero, total, t, True)
                k0, t = k1, t + lanes
