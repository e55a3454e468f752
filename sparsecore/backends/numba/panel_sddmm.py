"""``(dY^T X)`` at the nonzeros, for batches.

Each nonzero is a dot product of two panel rows. Its vector of 16 partial sums goes to a small buffer; 16 of them are
then summed at once, across rows, so that short rows cost no more than long ones. The order of a sum does not depend on
the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from sparsecore.backends.numba.jit import device_function, kernel
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.panel_spmm import _HEIGHT, _LOCAL, block_of
from sparsecore.backends.numba.panels import (
    index_space,
    lanes_of,
    localise,
    move,
    packed,
    pointer,
    split_rows,
    width_of,
)
from sparsecore.backends.numba.simd import (
    add,
    at,
    first_lanes,
    fma,
    hidden,
    load,
    load_masked,
    mul,
    store,
    store_masked,
    sum_of_each,
)

_RING = 128  # vectors in the buffer: fewer than 64 wait, and at most 64 are added before they are summed


def sddmm(crow, col, dy, x, out, n_chunks):
    batch, cols = x.shape
    dtype = torch.from_numpy(x).dtype
    width = width_of(batch)
    height = max(1, min(_HEIGHT, _LOCAL // cols))
    block = block_of(width, out.shape[0] / (cols * (crow.shape[0] - 1)))
    tiles = workspace("tiles", n_chunks, height * width + 512 + _RING * 16, dtype)
    local, segment = index_space(n_chunks, height, cols, block)
    sums = workspace("sums", n_chunks, height * cols + 64, dtype)
    _sddmm(
        crow, col, dy, packed(x, n_chunks), cols, block, height, tiles, local, segment, sums, out, n_chunks
    )


@kernel
def _sddmm(crow, col, dy, panels, cols, block, height, tiles, locals_, segments, all_sums, out, n_chunks):
    batch, rows = dy.shape
    source = dy.reshape(-1)
    blocks = -(-cols // block)
    for chunk in prange(n_chunks):
        local, segment, sums = locals_[chunk], segments[chunk], all_sums[chunk]
        tile = tiles[chunk]
        ring = tile[tile.shape[0] - 2048 :]
        spare = tile[tile.shape[0] - 2560 :]
        end = split_rows(crow, n_chunks, chunk + 1)
        for first in range(split_rows(crow, n_chunks, chunk), end, height):
            last = min(first + height, end)
            n = last - first
            localise(crow, col, first, last, cols, block, height, local, segment)
            for p in range(0, batch, 128):
                lanes = lanes_of(batch - p)
                for lane in range(0, lanes, 16):
                    examples = max(0, min(16, batch - p - lane))
                    for i in range(0, n, 16):
                        s = (p + lane) * rows + first + i
                        move(
                            source,
                            s,
                            rows,
                            examples,
                            min(16, n - i),
                            tile,
                            i * lanes + lane,
                            lanes,
                            16,
                            spare,
                        )
                begun = done = 0  # of the nonzeros, in the order block, row, column
                again = np.uint16(0xFFFF if p > 0 else 0)
                for b in range(blocks):
                    base = p * cols + b * block * lanes
                    for i in range(n):
                        k, stop = (
                            np.intp(at(segment, b * height + i)),
                            np.intp(at(segment, (b + 1) * height + i)),
                        )
                        last_row = b == blocks - 1 and i == n - 1
                        t = i * lanes
                        pieces = max(1, (stop - k + 63) // 64)
                        for _ in range(pieces):
                            piece = min(stop, k + 64)
                            if lanes == 128:
                                y0, y1, y2, y3 = (
                                    load(tile, t),
                                    load(tile, t + 16),
                                    load(tile, t + 32),
                                    load(tile, t + 48),
                                )
                                y4, y5, y6, y7 = (
                                    load(tile, t + 64),
                                    load(tile, t + 80),
                                    load(tile, t + 96),
                                    load(tile, t + 112),
                                )
                                while k < piece:
                                    j = base + np.intp(at(local, k)) * 128
                                    low = fma(y1, load(panels, j + 16), mul(y0, load(panels, j)))
                                    high = fma(y3, load(panels, j + 48), mul(y2, load(panels, j + 32)))
                                    low = fma(y5, load(panels, j + 80), fma(y4, load(panels, j + 64), low))
                                    high = fma(y7, load(panels, j + 112), fma(y6, load(panels, j + 96), high))
                                    store(ring, (begun & 127) * 16, add(low, high))
                                    begun += 1
                                    k = hidden(k + 1)
                            elif lanes == 64:
                                y0, y1, y2, y3 = (
                                    load(tile, t),
                                    load(tile, t + 16),
                                    load(tile, t + 32),
                                    load(tile, t + 48),
                                )
                                while k < piece:
                                    j = base + np.intp(at(local, k)) * 64
                                    low = fma(y1, load(panels, j + 16), mul(y0, load(panels, j)))
                                    high = fma(y3, load(panels, j + 48), mul(y2, load(panels, j + 32)))
                                    store(ring, (begun & 127) * 16, add(low, high))
                                    begun += 1
                                    k = hidden(k + 1)
                            elif lanes == 32:
                                y0, y1 = load(tile, t), load(tile, t + 16)
                                while k < piece:
                                    j = base + np.intp(at(local, k)) * 32
                                    low = fma(y1, load(panels, j + 16), mul(y0, load(panels, j)))
                                    store(ring, (begun & 127) * 16, low)
                                    begun += 1
                                    k = hidden(k + 1)
                            else:
                                y0 = load(tile, t)
                                while k < piece:
                                    j = base + np.intp(at(local, k)) * 16
                                    store(ring, (begun & 127) * 16, mul(y0, load(panels, j)))
                                    begun += 1
                                    k = hidden(k + 1)
                            final = last_row and k == stop
                            if final or begun - done >= 64:
                                until = begun if final else begun // 16 * 16
                                while done < until:
                                    total = _sum_16(ring, (done & 127) * 16)
                                    store(sums, done, add(total, load_masked(sums, done, again)))
                                    done += 16
            start = pointer(crow, first)
            done = 0
            for b in range(blocks):
                for i in range(n):
                    k, stop = np.intp(at(segment, b * height + i)), np.intp(at(segment, (b + 1) * height + i))
                    while k < stop:
                        now = min(16, stop - k)
                        store_masked(out, start + k, load(sums, done), first_lanes(now))
                        done += now
                        k += now


@device_function
def _sum_16(ring, r):
    """The sums of 16 vectors."""
    return sum_of_each(
        (
            load(ring, r), load(ring, r + 16), load(ring, r + 32), load(ring, r + 48),
            load(ring, r + 64), load(ring, r + 80), load(ring, r + 96), load(ring, r + 112),
            load(ring, r + 128), load(ring, r + 144), load(ring, r + 160), load(ring, r + 176),
            load(ring, r + 192), load(ring, r + 208), load(ring, r + 224), load(ring, r + 240),
        )
    )  # fmt: skip
