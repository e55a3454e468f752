"""``Y = X W^T`` for up to sixteen examples: a vector of 16 lanes holds several nonzeros of a row.

With w examples (1, 4, 8 or 16) it holds 16 / w: the activations of their columns, w numbers each, are put together
by as many scalar addresses, and one multiply-add takes them all. What is not stored costs nothing but its bit, the last
vector of a row is masked instead of looped over, and 16 rows are summed up together. Results do not depend on the
number of threads.

Rows are taken without a branch where it can be helped: next to one, numba keeps counting references to the arrays,
which takes longer than a short row.
"""

from __future__ import annotations

import numpy as np
import torch
from numba.extending import overload

from sparsecore.backends.numba.jit import device_function, kernel, serial_kernel, share_out
from sparsecore.backends.numba.memory import TYPES, workspace
from sparsecore.backends.numba.packing import room
from sparsecore.backends.numba.panels import pointer, split_rows
from sparsecore.backends.numba.simd import (
    LANES,
    add,
    at,
    bits64,
    count,
    first_lanes,
    fma,
    load,
    positions,
    positions_few,
    put,
    store,
    store_masked,
    sum_of_rows,
    transpose,
    transpose_part,
    zeros,
)
from sparsecore.backends.numba.simd_groups import first_only, picked, repeated, repeated_first

__all__ = ["spmm"]

_CROWDED = 0.3  # density from which more than 32 of 64 positions may well be stored
_EXAMPLES = {w: (np.int8(0),) * w for w in (1, 4, 8, 16)}  # a kernel each


def spmm(values, crow, col, x, y, n_chunks):
    (batch, cols), rows = x.shape, y.shape[1]
    w = 1 if batch == 1 else max(4, 1 << (batch - 1).bit_length())
    kind = TYPES[x.dtype]
    tiles = workspace("tiles", n_chunks, 2 * LANES * LANES, kind)
    if col is None:
        column = torch.int16 if cols <= 1 << 16 else torch.int32
        local = workspace("columns", n_chunks, min(LANES * cols, len(values)) + 64, column)
    else:
        local = tiles
    if batch == 1:
        panels = x
    else:
        panels = room(n_chunks, w * cols, kind)
        if len(panels) < n_chunks:
            _pack_once(x, panels[0], _EXAMPLES[w])
    crowded = values.shape[0] > _CROWDED * rows * cols
    local = local.view(np.uint32 if local.itemsize == 4 else np.uint16)
    _sum_rows(values, crow, col, x, panels, _EXAMPLES[w], tiles, local, crowded, y, n_chunks)


@device_function
def _pack(x, panel, examples):
    """panel[w * j + e] = x[e, j]; 0 in lanes that are left."""
    batch, cols = x.shape
    w = len(examples)
    flat = x.reshape(-1)
    for j in range(0, cols, LANES):
        transpose_part(flat, j, cols, batch, min(LANES, cols - j), panel, j * w, w, w)


@serial_kernel
def _pack_once(x, panel, examples):
    _pack(x, panel, examples)


@kernel
def _sum_rows(values, crow, col, x, panels, examples, tiles, locals_, crowded, y, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch, rows = y.shape
    w = len(examples)
    panel = panels[min(chunk, panels.shape[0] - 1)]
    if w > 1 and panels.shape[0] >= n_chunks:  # this thread's own: see `packing`
        _pack(x, panel, examples)
    out = y.reshape(-1)
    tile, local = tiles[chunk], locals_[chunk]
    turned = tile[LANES * LANES :]
    end = split_rows(crow, n_chunks, chunk + 1)
    for first in range(split_rows(crow, n_chunks, chunk), end, LANES):
        n = min(LANES, end - first)
        start = pointer(crow, first)
        _decode(crow, first, first + n, crowded, local)
        for i in range(n):
            a, b = pointer(crow, first + i), pointer(crow, first + i + 1)
            if col is None:
                store(tile, i * LANES, _sum(values, a, b, local, a - start, panel, examples))
            elif b + LANES <= len(col):
                store(tile, i * LANES, _sum(values, a, b, col, a, panel, examples))
            else:
                _sum_last(values, a, b, col, panel, examples, tile, i * LANES)
        # What is left in the tile's other rows is not written anywhere.
        if w == 1:
            store_masked(out, first, sum_of_rows(tile, 0), first_lanes(n))
        else:
            transpose(tile, 0, LANES, turned, 0, LANES)
            for e in range(batch):
                s = load(turned, e * LANES)
                for i in range(1, LANES // w):
                    s = add(s, load(turned, (i * w + e) * LANES))
                store_masked(out, e * rows + first, s, first_lanes(n))


def _decode(crow, first, last, crowded, local):
    """Write the columns of some rows of a bitmap, and some zeros."""
    raise NotImplementedError


@overload(_decode)
def _decoded(crow, first, last, crowded, local):
    if crow.ndim == 1:
        return lambda crow, first, last, crowded, local: None

    def decode(crow, first, last, crowded, local):
        words = crow.shape[1]
        flat = crow.reshape(-1)
        k = 0
        for row in range(first, last):
            for g in range(words // 2):
                mask = bits64(flat, row * words + 1 + 2 * g)
                if 2 * g + 3 > words:  # these 64 bits reach into the next row's pointer
                    mask &= np.uint64(0xFFFFFFFF)
                n = count(mask)
                if crowded or n > 32:
                    positions(local, k, mask, g * 64)
                else:
                    positions_few(local, k, mask, g * 64)
                k += n
        positions_few(local, k, np.uint64(0), 0)

    return decode


@device_function
def _sum(values, first, last, columns, place, panel, examples):
    """Sum of values[k] * panel[columns[place + k - first]] for k from first to last, 16 / w of them in a vector.

    Two sums at a time: multiply-adds to the same one would wait for each other.
    """
    w = len(examples)
    groups = LANES // w
    zero = zeros(values)
    a = b = zero
    k, j = first, place
    while w > 2 and k + 2 * groups < last:
        a = fma(repeated(values, k, examples), picked(panel, columns, j, examples), a)
        b = fma(repeated(values, k + groups, examples), picked(panel, columns, j + groups, examples), b)
        k += 2 * groups
        j += 2 * groups
    while k + groups < last:
        a = fma(repeated(values, k, examples), picked(panel, columns, j, examples), a)
        k += groups
        j += groups
    x = first_only(picked(panel, columns, j, examples), (last - k) * w)
    b = fma(repeated_first(values, k, last - k, examples), x, b)
    return add(a, b)


@device_function
def _sum_last(values, first, last, columns, panel, examples, tile, t):
    """A row at whose end a vector of columns could reach beyond theirs: its last nonzeros one by one."""
    w = len(examples)
    whole = last - (last - first) % (LANES // w)
    store(tile, t, zeros(values))
    if whole > first:
        store(tile, t, _sum(values, first, whole, columns, first, panel, examples))
    for k in range(whole, last):
        for e in range(w):
            product = at(values, k) * at(panel, np.intp(at(columns, k)) * w + e)
            put(tile, t + e, at(tile, t + e) + product)
