"""``Y = X W^T`` for batches: sums of panel rows, one row of W after the other.

Sums over a row run in column order whatever the number of threads: results do not depend on it.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.packing import lanes_of, own_panels, panels_of, parts, width_of
from sparsecore.backends.numba.panels import (
    index_space,
    localise,
    pointer,
    row_of_16,
    row_of_32,
    row_of_64,
    row_of_128,
    split_rows,
)
from sparsecore.backends.numba.simd import at, transpose_part

_HEIGHT = 128  # rows of W that are decoded at a time
WIDE = 4096  # columns of a W that is wide: a panel does not stay in the second-level cache
ROWS_AHEAD = (
    2  # whose values in a block of a wide W are asked for: a whole range of rows would not stay there either
)
_LOCAL = 1 << 22  # ... fewer where a row is so long that their columns would take more positions than this


def spmm(values, crow, col, x, y, n_chunks):
    batch, cols = x.shape
    width, dtype = width_of(batch), torch.from_numpy(x).dtype
    height = max(1, min(_HEIGHT, _LOCAL // cols))
    block = block_of(width, values.shape[0] / (cols * (crow.shape[0] - 1)), cols)
    tiles = workspace("tiles", n_chunks, height * width, dtype)
    local, segment = index_space(n_chunks, height, cols, block)
    for part in parts(batch, cols):
        panels = panels_of(x[part], n_chunks)
        _spmm(values, crow, col, x[part], panels, block, height, tiles, local, segment, y[part], n_chunks)


def block_of(width: int, density: float, cols: int) -> int:
    """Columns of W in a block: 32 KiB of panel, the first-level cache (narrow panels: 64). More where too little is
    done with a row's nonzeros in a block to pay for the branch at its end, which is mispredicted, and for its sums,
    which are far away when W is wide (measured on Zen 4 at 20000 x 600 and 600 x 20000).
    """
    block = (8192 if width >= 64 else 16384) // width
    enough = 1600 if cols <= WIDE else 2600
    while block < 65536 and block * density * width < enough:
        block *= 2
    return block


@kernel
def _spmm(values, crow, col, x, panels_, block, height, tiles, locals_, segments, y, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    panels, cols = own_panels(x, panels_, n_chunks, chunk), x.shape[1]
    batch, rows = y.shape
    out = y.reshape(-1)
    blocks = -(-cols // block)
    zero = panels.shape[0] - 64
    local, segment = locals_[chunk], segments[chunk]
    tile = tiles[chunk]
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, height):
        last = min(first + height, end)
        n = last - first
        localise(crow, col, first, last, cols, block, height, local, segment)
        start, ahead, wide = pointer(crow, first), pointer(crow, last), cols > WIDE
        for p in range(0, batch, 128):
            lanes = lanes_of(batch - p)
            for b in range(blocks):
                base = p * cols + b * block * lanes
                for i in range(n):
                    k0, k1 = (
                        np.intp(at(segment, b * height + i)),
                        np.intp(at(segment, (b + 1) * height + i)),
                    )
                    t = i * lanes
                    if wide:
                        ahead = start + np.intp(at(segment, b * height + min(i + ROWS_AHEAD, n - 1))) - k0
                    if lanes == 128:
                        row_of_128(values, start, ahead, local, k0, k1, panels, base, zero, tile, t, b > 0)
                    elif lanes == 64:
                        row_of_64(values, start, ahead, local, k0, k1, panels, base, zero, tile, t, b > 0)
                    elif lanes == 32:
                        row_of_32(values, start, ahead, local, k0, k1, panels, base, zero, tile, t, b > 0)
                    else:
                        row_of_16(values, start, ahead, local, k0, k1, panels, base, zero, tile, t, b > 0)
            for lane in range(0, min(lanes, batch - p), 16):
                examples = min(16, batch - p - lane)
                for i in range(0, n, 16):
                    t = (p + lane) * rows + first + i
                    wide = min(16, n - i)
                    transpose_part(tile, i * lanes + lane, lanes, wide, examples, out, t, rows, wide)
