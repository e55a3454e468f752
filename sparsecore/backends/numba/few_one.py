"""``y = W x`` for one example, from a bitmap: 64 positions of a row at a time.

A chunk of rows is read as four streams, a quarter of its rows each, side by side: they share the activations, which
stay in registers, and each is read in order, as the processor's own prefetching likes it. Three ways to bring values
and activations together, by density: spread the values out to 16 positions, or pick the activations that belong to
the values, out of 32 positions or of 64. Results do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba.extending import overload

from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import TYPES, workspace
from sparsecore.backends.numba.panels import split_rows
from sparsecore.backends.numba.simd import (
    LANES,
    at,
    bits64,
    count,
    fma,
    horizontal_sum,
    load,
    lowest,
    prefetch,
    put,
    spread,
    where,
    zeros,
)
from sparsecore.backends.numba.simd_picked import add_picked_32, add_picked_64, can_pick

__all__ = ["spmm"]

_AHEAD = 1024  # values that are asked for before they are read
_SPREAD, _PICK_32, _PICK_64 = ((np.int8(0),) * n for n in (1, 2, 3))  # a kernel each
# Density up to which few rows have more than 16 values in so many positions: 16 are picked without a branch.
_SPARSE = {64: 0.18, 32: 0.4}


def spmm(values, crow, x, y, n_chunks):
    cols, rows = len(x), len(y)
    wide = -(-cols // 64) * 64
    padded = workspace("panels", 1, wide, TYPES[x.dtype])[0]
    padded[:cols] = x
    padded[cols:wide] = 0
    form, density = _SPREAD, len(values) / (rows * cols)
    if can_pick(x.dtype):
        form = _PICK_64 if density <= _SPARSE[64] else _PICK_32 if density <= _SPARSE[32] else _SPREAD
    _dot_rows(values, crow, padded[:wide], y, form, n_chunks)


@kernel
def _dot_rows(values, crow, x, y, form, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    words, wide, rows = crow.reshape(-1), crow.shape[1], crow.shape[0] - 1
    inner = rows  # up to here the vectors that begin in a row lie within the values
    while inner > 0 and np.intp(crow[inner, 0]) + 64 > len(values):
        inner -= 1
    start, end = split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)
    for row in range(max(start, inner), end):
        put(y, row, _last_dot(values, words, wide, row, x, form))
    end = min(end, inner)
    quarter = (end - start + 3) // 4
    for r0 in range(start, start + quarter):
        # Past the chunk's end its last row again, whose sum is the same.
        r1, r2, r3 = (
            min(r0 + quarter, end - 1),
            min(r0 + 2 * quarter, end - 1),
            min(r0 + 3 * quarter, end - 1),
        )
        p0, p1, p2, p3 = r0 * wide, r1 * wide, r2 * wide, r3 * wide
        k0, k1 = np.intp(at(words, p0)), np.intp(at(words, p1))
        k2, k3 = np.intp(at(words, p2)), np.intp(at(words, p3))
        a, b, c, d = zeros(x), zeros(x), zeros(x), zeros(x)
        for j in range(0, len(x), 64):
            block = load(x, j), load(x, j + 16), load(x, j + 32), load(x, j + 48)
            m0, m1 = _bits(words, p0, wide, j), _bits(words, p1, wide, j)
            m2, m3 = _bits(words, p2, wide, j), _bits(words, p3, wide, j)
            a, k0 = _add(a, values, k0, m0, block, form), k0 + count(m0)
            b, k1 = _add(b, values, k1, m1, block, form), k1 + count(m1)
            c, k2 = _add(c, values, k2, m2, block, form), k2 + count(m2)
            d, k3 = _add(d, values, k3, m3, block, form), k3 + count(m3)
        put(y, r0, horizontal_sum(a))
        put(y, r1, horizontal_sum(b))
        put(y, r2, horizontal_sum(c))
        put(y, r3, horizontal_sum(d))


@device_function
def _last_dot(values, words, wide, row, x, form):
    """The product of a row near the end of the values: where a vector might reach beyond, one by one."""
    k = np.intp(at(words, row * wide))
    total, rest = zeros(x), values.dtype.type(0)
    for j in range(0, len(x), 64):
        mask = _bits(words, row * wide, wide, j)
        if k + 64 <= len(values):
            block = load(x, j), load(x, j + 16), load(x, j + 32), load(x, j + 48)
            total = _add(total, values, k, mask, block, form)
        else:
            left = mask
            for i in range(count(mask)):
                rest += at(values, k + i) * at(x, j + lowest(left))
                left &= left - np.uint64(1)
        k += count(mask)
    return horizontal_sum(total) + rest


@device_function
def _bits(words, place, wide, j):
    """64 bits of the row that begins at a place; its last may reach into the next row's pointer."""
    word = 1 + j // 32
    return bits64(words, place + word) & (np.uint64(0xFFFFFFFF) if word + 1 >= wide else ~np.uint64(0))


def _add(total, values, k, mask, x, form):
    """total + the values from k on, times the x of 64 that belong to the mask's bits, in any lanes."""
    raise NotImplementedError


@overload(_add)
def _added(total, values, k, mask, x, form):
    if form.count == len(_PICK_64):

        def pick(total, values, k, mask, x, form):
            _ask(values, k)
            return add_picked_64(total, values, k, mask, x)

    elif form.count == len(_PICK_32):

        def pick(total, values, k, mask, x, form):
            _ask(values, k)
            low = np.uint32(mask)
            total = add_picked_32(total, values, k, low, (x[0], x[1]))
            return add_picked_32(
                total, values, k + count(low), np.uint32(mask >> np.uint64(32)), (x[2], x[3])
            )

    else:

        def pick(total, values, k, mask, x, form):
            _ask(values, k)
            m0, m1 = np.uint16(mask), np.uint16(mask >> np.uint64(16))
            m2, m3 = np.uint16(mask >> np.uint64(32)), np.uint16(mask >> np.uint64(48))
            k2 = k + count(np.uint32(mask))
            total = _add_spread(total, values, k, m0, x[0])
            total = _add_spread(total, values, k + count(m0), m1, x[1])
            total = _add_spread(total, values, k2, m2, x[2])
            return _add_spread(total, values, k2 + count(m2), m3, x[3])

    return pick


@device_function
def _ask(values, k):
    prefetch(values, k + _AHEAD)
    prefetch(values, k + _AHEAD + LANES)


@device_function
def _add_spread(total, values, k, mask, x):
    """Places that are not stored are masked, not multiplied by 0: infinity times 0 would be NaN."""
    value = spread(load(values, k), mask)  # slow where the load is masked
    return where(mask, fma(value, x, total), total)
