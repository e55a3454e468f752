"""``(dY^T X)`` at the nonzeros, for batches.

Each nonzero is a dot product of two panel rows. Sixteen of a row are computed at a time, in registers, and their
vectors of partial sums are then added up together (`dots.dot_4`). The order of a sum does not depend on the number of
threads.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.dots import dot_4, load_4, rows_of, store_4
from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.packing import lanes_of, own_panels, panels_of, parts, width_of
from sparsecore.backends.numba.panel_spmm import _HEIGHT, _LOCAL, block_of
from sparsecore.backends.numba.panel_spmm_t import tile_of
from sparsecore.backends.numba.panels import index_space, localise, pointer, split_rows
from sparsecore.backends.numba.simd import add, at, hidden, prefetch


def sddmm(crow, col, dy, x, out, n_chunks):
    batch, cols = x.shape
    dtype = torch.from_numpy(x).dtype
    width = width_of(batch)
    height = max(1, min(_HEIGHT, _LOCAL // cols))
    block = block_of(width, out.shape[0] / (cols * (crow.shape[0] - 1)), cols)
    tiles = workspace("tiles", n_chunks, height * width, dtype)
    local, segment = index_space(n_chunks, height, cols, block)
    for part in parts(batch, cols):
        panels, more = panels_of(x[part], n_chunks), part.start > 0
        scratch = (tiles, local, segment)
        _sddmm(crow, col, dy[part], x[part], panels, block, height, *scratch, out, more, n_chunks)


@kernel
def _sddmm(crow, col, dy, x, panels_, block, height, tiles, locals_, segments, out, more, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    panels, cols = own_panels(x, panels_, n_chunks, chunk), x.shape[1]
    batch = dy.shape[0]
    blocks = -(-cols // block)
    local, segment, tile = locals_[chunk], segments[chunk], tiles[chunk]
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, height):
        last = min(first + height, end)
        n = last - first
        localise(crow, col, first, last, cols, block, height, local, segment)
        start = pointer(crow, first)
        for p in range(0, batch, 128):
            lanes = lanes_of(batch - p)
            tile_of(dy, p, first, last, tile, lanes)
            again = more or p > 0
            for b in range(blocks):
                base = p * cols + b * block * lanes
                for i in range(n):
                    k0 = np.intp(at(segment, b * height + i))
                    k1 = np.intp(at(segment, (b + 1) * height + i))
                    t = i * lanes
                    if (
                        again and i + 1 < n
                    ):  # the next row's sums: the processor would not foresee where they lie
                        ahead = np.intp(at(segment, (b + 1) * height + i + 1))
                        for k in range(np.intp(at(segment, b * height + i + 1)), ahead, 16):
                            prefetch(out, start + k)
                    if lanes == 128:
                        _dots(_EIGHT, tile, t, local, k0, k1, panels, base, out, start, again)
                    elif lanes == 64:
                        _dots(_FOUR, tile, t, local, k0, k1, panels, base, out, start, again)
                    elif lanes == 32:
                        _dots(_TWO, tile, t, local, k0, k1, panels, base, out, start, again)
                    else:
                        _dots(_ONE, tile, t, local, k0, k1, panels, base, out, start, again)


_ONE, _TWO, _FOUR, _EIGHT = (0,), (0,) * 2, (0,) * 4, (0,) * 8  # vectors of a panel row


@device_function
def _dots(vectors, tile, t, local, first, last, panels, base, out, start, more):
    """out[start + k] (+)= the dot product of the tile's row at t and the panel row of nonzero k, from first to last."""
    y = rows_of(vectors, tile, t)
    k = first
    while k < last:
        total = dot_4(y, local, k, last, panels, base)
        if more:
            total = add(total, load_4(out, start + k, last - k))
        store_4(out, start + k, last - k, total)
        k = hidden(k + 4)
