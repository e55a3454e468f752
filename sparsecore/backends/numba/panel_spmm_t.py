"""``dX = dY W`` for batches: every nonzero adds its multiple of a panel row of dY to a panel row of dX.

The block of dX that rows of W are added to stays in the first-level cache and no transposed index is needed. Turning
chunks of W column-major in scratch, so that sums stay in registers, is faster with more than 32 examples at densities
from 0.2 on, and else with 128 and more (`turned_spmm_t`). Threads take rows and have a dX each; those are added in the
order of the threads: results depend on the number of threads, and on nothing else.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.packing import lanes_of, padded, parts, width_of
from sparsecore.backends.numba.panel_spmm import _HEIGHT, _LOCAL, ROWS_AHEAD, WIDE, block_of
from sparsecore.backends.numba.panels import index_space, localise, pointer, split_rows
from sparsecore.backends.numba.simd import add, at, fma, hidden, load, prefetch, splat, store, transpose_part


def spmm_t(values, crow, col, dy, dx, n_chunks):
    batch, cols = dx.shape
    rows = dy.shape[1]
    dtype = torch.from_numpy(dy).dtype
    width = width_of(batch)
    height = max(1, min(_HEIGHT, _LOCAL // cols))
    block = block_of(width, values.shape[0] / (cols * rows), cols)
    tiles = workspace("tiles", n_chunks, height * width, dtype)
    local, segment = index_space(n_chunks, height, cols, block)
    for part in parts(batch, cols):
        sums = workspace("sums", n_chunks, padded(len(dy[part])) * cols, dtype)
        _spmm_t(values, crow, col, dy[part], cols, block, height, tiles, local, segment, sums, n_chunks)
        add_and_unpack(sums, dx[part], n_chunks)


@kernel
def _spmm_t(values, crow, col, dy, cols, block, height, tiles, locals_, segments, sums, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch = dy.shape[0]
    blocks = -(-cols // block)
    local, segment = locals_[chunk], segments[chunk]
    total, tile = sums[chunk], tiles[chunk]
    total[:] = 0
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, height):
        last = min(first + height, end)
        n = last - first
        localise(crow, col, first, last, cols, block, height, local, segment)
        start, ahead, wide = pointer(crow, first), pointer(crow, last), cols > WIDE
        for p in range(0, batch, 128):
            lanes = lanes_of(batch - p)
            tile_of(dy, p, first, last, tile, lanes)
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
                        _add_128(values, start, ahead, local, k0, k1, tile, t, total, base)
                    elif lanes == 64:
                        _add_64(values, start, ahead, local, k0, k1, tile, t, total, base)
                    elif lanes == 32:
                        _add_32(values, start, ahead, local, k0, k1, tile, t, total, base)
                    else:
                        _add_16(values, start, ahead, local, k0, k1, tile, t, total, base)


@device_function
def tile_of(dy, p, first, last, tile, lanes):
    """Columns first .. last of dY's examples from p on, turned to panel rows."""
    batch, rows = dy.shape
    source, n = dy.reshape(-1), last - first
    for lane in range(0, lanes, 16):
        examples = max(0, min(16, batch - p - lane))
        for i in range(0, n, 16):
            s = (p + lane) * rows + first + i
            transpose_part(source, s, rows, examples, min(16, n - i), tile, i * lanes + lane, lanes, 16)


@device_function
def _add_128(values, start, ahead, local, first, last, tile, t, total, base):
    y0, y1, y2, y3 = load(tile, t), load(tile, t + 16), load(tile, t + 32), load(tile, t + 48)
    y4, y5, y6, y7 = load(tile, t + 64), load(tile, t + 80), load(tile, t + 96), load(tile, t + 112)
    k = first
    while k < last:
        prefetch(values, ahead + k)
        w = splat(at(values, start + k))
        j = base + np.intp(at(local, k)) * 128
        store(total, j, fma(w, y0, load(total, j)))
        store(total, j + 16, fma(w, y1, load(total, j + 16)))
        store(total, j + 32, fma(w, y2, load(total, j + 32)))
        store(total, j + 48, fma(w, y3, load(total, j + 48)))
        store(total, j + 64, fma(w, y4, load(total, j + 64)))
        store(total, j + 80, fma(w, y5, load(total, j + 80)))
        store(total, j + 96, fma(w, y6, load(total, j + 96)))
        store(total, j + 112, fma(w, y7, load(total, j + 112)))
        k = hidden(k + 1)


@device_function
def _add_64(values, start, ahead, local, first, last, tile, t, total, base):
    y0, y1, y2, y3 = load(tile, t), load(tile, t + 16), load(tile, t + 32), load(tile, t + 48)
    k = first
    while k < last:
        prefetch(values, ahead + k)
        w = splat(at(values, start + k))
        j = base + np.intp(at(local, k)) * 64
        store(total, j, fma(w, y0, load(total, j)))
        store(total, j + 16, fma(w, y1, load(total, j + 16)))
        store(total, j + 32, fma(w, y2, load(total, j + 32)))
        store(total, j + 48, fma(w, y3, load(total, j + 48)))
        k = hidden(k + 1)


@device_function
def _add_32(values, start, ahead, local, first, last, tile, t, total, base):
    y0, y1 = load(tile, t), load(tile, t + 16)
    k = first
    while k < last:
        prefetch(values, ahead + k)
        w = splat(at(values, start + k))
        j = base + np.intp(at(local, k)) * 32
        store(total, j, fma(w, y0, load(total, j)))
        store(total, j + 16, fma(w, y1, load(total, j + 16)))
        k = hidden(k + 1)


@device_function
def _add_16(values, start, ahead, local, first, last, tile, t, total, base):
    y0 = load(tile, t)
    k = first
    while k < last:
        prefetch(values, ahead + k)
        j = base + np.intp(at(local, k)) * 16
        store(total, j, fma(splat(at(values, start + k)), y0, load(total, j)))
        k = hidden(k + 1)


@kernel
def add_and_unpack(sums, dx, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch, cols = dx.shape
    parts, size = sums.shape
    out, flat = dx.reshape(-1), sums.reshape(-1)
    groups = -(-cols // 16)
    for p in range(0, batch, 128):
        lanes = lanes_of(batch - p)
        for g in range(groups * chunk // n_chunks, groups * (chunk + 1) // n_chunks):
            j = g * 16
            wide = min(16, cols - j)
            s = p * cols + j * lanes
            for t in range(s, s + wide * lanes, 16):
                v = load(flat, t)
                for part in range(1, parts):
                    v = add(v, load(flat, part * size + t))
                store(flat, t, v)
            for lane in range(0, min(lanes, batch - p), 16):
                examples = min(16, batch - p - lane)
                transpose_part(flat, s + lane, lanes, wide, examples, out, (p + lane) * cols + j, cols, wide)
