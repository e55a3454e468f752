"""What the products of larger batches share: activations as panels, index sets as columns local to a block.

A *panel* holds up to 128 examples feature-major, (features, lanes): a nonzero is then one multiply-add over contiguous
lanes, with the weight broadcast. The features are taken in blocks, so that the block of the panel that a kernel reads
at random stays in the first-level cache (about 48 KiB; 64 KiB give 84 % of the speed, 128 KiB 70 %).
Panels must begin on cache lines: loads across two lines halve the speed (measured: 135 instead of 250 GFLOP/s), so they
are torch's memory, not numba's.
"""

from __future__ import annotations

import numpy as np
import torch
from numba.extending import overload

from sparsecore.backends.numba.jit import device_function
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.simd import (
    add,
    at,
    bits64,
    count,
    fma,
    has_avx512,
    hidden,
    load,
    mul,
    positions,
    prefetch,
    put,
    splat,
    store,
    zeros,
)

# Without AVX-512 there are 16 registers of half a vector: eight sums leave none. They were put on the stack in every
# turn, and where a worker's stack happened to lie badly, two threads took longer than one.
_HALVES = not has_avx512()


# ---------------------------------------------------------------- index sets


def pointer(crow, row):
    """First nonzero of a row, from either encoding."""
    raise NotImplementedError


@overload(pointer, inline="always")
def _pointer(crow, row):
    if crow.ndim == 2:
        return lambda crow, row: np.intp(crow[row, 0])
    return lambda crow, row: np.intp(crow[row])


@device_function
def split_rows(crow, n_chunks, chunk):
    """First row of a chunk when rows are split so that rows + nonzeros are even, for either encoding."""
    n_rows = crow.shape[0] - 1
    target = (pointer(crow, n_rows) + n_rows) * chunk // n_chunks
    low, high = 0, n_rows
    while low < high:
        middle = (low + high) // 2
        if pointer(crow, middle) + middle >= target:
            high = middle
        else:
            low = middle + 1
    return low


def index_space(n_chunks: int, height: int, cols: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for what `localise` writes."""
    local = workspace("local", n_chunks, height * cols + 64, torch.int16).view(np.uint16)
    return local, workspace("segment", n_chunks, height * (-(-cols // block) + 1), torch.int32)


def localise(crow, col, first, last, cols, block, height, local, segment):
    """Columns of rows first .. last within their blocks of ``block`` (a power of two >= 64) columns, and where those
    begin: nonzeros ``segment[b * height + i]`` .. ``segment[(b + 1) * height + i]``, counted from the first row's
    first, lie in row first + i and block b. Up to 64 numbers more than there are nonzeros are written to ``local``.
    """
    raise NotImplementedError


@overload(localise)
def _localise(crow, col, first, last, cols, block, height, local, segment):
    return _localise_bitmap if crow.ndim == 2 else _localise_csr


def _localise_bitmap(crow, col, first, last, cols, block, height, local, segment):
    words = crow.shape[1]
    flat = crow.reshape(-1)
    start = np.intp(flat[first * words])
    groups = -(-cols // 64)
    per_block = block // 64
    # The last 64 bits of a row may reach into the next row's pointer.
    tail = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(groups * 64 - cols)
    for row in range(first, last):
        k = np.intp(flat[row * words]) - start
        word = row * words + 1
        place = row - first
        g = 0
        while g < groups:
            put(segment, place, np.int32(k))
            place += height
            for inner in range(min(per_block, groups - g)):
                mask = bits64(flat, word)
                if g == groups - 1:
                    mask &= tail
                positions(local, k, mask, inner * 64)
                k += count(mask)
                word += 2
                g += 1
        put(segment, place, np.int32(k))


def _localise_csr(crow, col, first, last, cols, block, height, local, segment):
    start, end = np.intp(crow[first]), np.intp(crow[last])
    for k in range(start, end):
        local[k - start] = np.uint16(np.intp(col[k]) & (block - 1))
    blocks = -(-cols // block)
    for row in range(first, last):
        k, stop = np.intp(crow[row]), np.intp(crow[row + 1])
        place = row - first
        put(segment, place, np.int32(k - start))
        for b in range(1, blocks):
            # Binary search without branches: the first column of block b or later.
            n = min(stop - k, block)
            while n > 0:
                half = (n + 1) // 2
                k += half if np.intp(at(col, k + half - 1)) < b * block else 0
                n -= half
            put(segment, b * height + place, np.int32(k - start))
        put(segment, blocks * height + place, np.int32(stop - start))


# ---------------------------------------------------------------- sums of weighted panel rows
# sums[t ...] (+)= sum over k of values[start + k] * panels[base + local[k] * lanes ...]. Loops have one exit only,
# which is mispredicted once a segment; `hidden` keeps LLVM from unrolling them into several. Values of the next chunk,
# which begin at `ahead`, are fetched meanwhile: read in blocks they are too scattered for the processor to foresee.


@device_function
def _four_vectors(values, start, ahead, local, first, last, panels, base, lanes, sums, t, more):
    a0 = a1 = a2 = a3 = zeros(panels)
    if more:
        a0, a1, a2, a3 = load(sums, t), load(sums, t + 16), load(sums, t + 32), load(sums, t + 48)
    k = first
    while k < last:
        prefetch(values, ahead + k)
        w = splat(at(values, start + k))
        j = base + np.intp(at(local, k)) * lanes
        a0 = fma(w, load(panels, j), a0)
        a1 = fma(w, load(panels, j + 16), a1)
        a2 = fma(w, load(panels, j + 32), a2)
        a3 = fma(w, load(panels, j + 48), a3)
        k = hidden(k + 1)
    store(sums, t, a0)
    store(sums, t + 16, a1)
    store(sums, t + 32, a2)
    store(sums, t + 48, a3)


@device_function
def row_of_128(values, start, ahead, local, first, last, panels, base, zero, sums, t, more):
    if _HALVES:
        _four_vectors(values, start, ahead, local, first, last, panels, base, 128, sums, t, more)
        _four_vectors(values, start, ahead, local, first, last, panels, base + 64, 128, sums, t + 64, more)
        return
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = zeros(panels)
    if more:
        a0, a1, a2, a3 = load(sums, t), load(sums, t + 16), load(sums, t + 32), load(sums, t + 48)
        a4, a5, a6, a7 = load(sums, t + 64), load(sums, t + 80), load(sums, t + 96), load(sums, t + 112)
    k = first
    while k < last:
        prefetch(values, ahead + k)
        w = splat(at(values, start + k))
        j = base + np.intp(at(local, k)) * 128
        a0 = fma(w, load(panels, j), a0)
        a1 = fma(w, load(panels, j + 16), a1)
        a2 = fma(w, load(panels, j + 32), a2)
        a3 = fma(w, load(panels, j + 48), a3)
        a4 = fma(w, load(panels, j + 64), a4)
        a5 = fma(w, load(panels, j + 80), a5)
        a6 = fma(w, load(panels, j + 96), a6)
        a7 = fma(w, load(panels, j + 112), a7)
        k = hidden(k + 1)
    store(sums, t, a0)
    store(sums, t + 16, a1)
    store(sums, t + 32, a2)
    store(sums, t + 48, a3)
    store(sums, t + 64, a4)
    store(sums, t + 80, a5)
    store(sums, t + 96, a6)
    store(sums, t + 112, a7)


@device_function
def _or_nothing(values, start, local, k, there, base, lanes, zero):
    """Weight and place of nonzero k, or 0 and a row of zeros where it is not there: no branch."""
    w = at(values, start + k if there else max(start - 1, 0))
    j = base + np.intp(at(local, k)) * lanes
    return splat(w if there else values.dtype.type(0)), j if there else zero


@device_function
def row_of_64(values, start, ahead, local, first, last, panels, base, zero, sums, t, more):
    """Two nonzeros at a time: multiply-adds to the same sum would wait for each other."""
    if _HALVES:
        _four_vectors(values, start, ahead, local, first, last, panels, base, 64, sums, t, more)
        return
    a0 = a1 = a2 = a3 = zeros(panels)
    if more:
        a0, a1, a2, a3 = load(sums, t), load(sums, t + 16), load(sums, t + 32), load(sums, t + 48)
    odd = (last - first) & 1
    w, j = _or_nothing(values, start, local, first, odd > 0, base, 64, zero)
    b0 = mul(w, load(panels, j))
    b1 = mul(w, load(panels, j + 16))
    b2 = mul(w, load(panels, j + 32))
    b3 = mul(w, load(panels, j + 48))
    k = first + odd
    while k < last:
        prefetch(values, ahead + k)
        w = splat(at(values, start + k))
        j = base + np.intp(at(local, k)) * 64
        a0 = fma(w, load(panels, j), a0)
        a1 = fma(w, load(panels, j + 16), a1)
        a2 = fma(w, load(panels, j + 32), a2)
        a3 = fma(w, load(panels, j + 48), a3)
        w = splat(at(values, start + k + 1))
        j = base + np.intp(at(local, k + 1)) * 64
        b0 = fma(w, load(panels, j), b0)
        b1 = fma(w, load(panels, j + 16), b1)
        b2 = fma(w, load(panels, j + 32), b2)
        b3 = fma(w, load(panels, j + 48), b3)
        k = hidden(k + 2)
    store(sums, t, add(a0, b0))
    store(sums, t + 16, add(a1, b1))
    store(sums, t + 32, add(a2, b2))
    store(sums, t + 48, add(a3, b3))


@device_function
def row_of_32(values, start, ahead, local, first, last, panels, base, zero, sums, t, more):
    """Four nonzeros at a time."""
    a0 = a1 = zeros(panels)
    if more:
        a0, a1 = load(sums, t), load(sums, t + 16)
    rest = (last - first) & 3
    w, j = _or_nothing(values, start, local, first, rest > 0, base, 32, zero)
    b0, b1 = mul(w, load(panels, j)), mul(w, load(panels, j + 16))
    w, j = _or_nothing(values, start, local, first + 1, rest > 1, base, 32, zero)
    c0, c1 = mul(w, load(panels, j)), mul(w, load(panels, j + 16))
    w, j = _or_nothing(values, start, local, first + 2, rest > 2, base, 32, zero)
    d0, d1 = mul(w, load(panels, j)), mul(w, load(panels, j + 16))
    k = first + rest
    while k < last:
        prefetch(values, ahead + k)
        w, j = splat(at(values, start + k)), base + np.intp(at(local, k)) * 32
        a0, a1 = fma(w, load(panels, j), a0), fma(w, load(panels, j + 16), a1)
        w, j = splat(at(values, start + k + 1)), base + np.intp(at(local, k + 1)) * 32
        b0, b1 = fma(w, load(panels, j), b0), fma(w, load(panels, j + 16), b1)
        w, j = splat(at(values, start + k + 2)), base + np.intp(at(local, k + 2)) * 32
        c0, c1 = fma(w, load(panels, j), c0), fma(w, load(panels, j + 16), c1)
        w, j = splat(at(values, start + k + 3)), base + np.intp(at(local, k + 3)) * 32
        d0, d1 = fma(w, load(panels, j), d0), fma(w, load(panels, j + 16), d1)
        k = hidden(k + 4)
    store(sums, t, add(add(a0, b0), add(c0, d0)))
    store(sums, t + 16, add(add(a1, b1), add(c1, d1)))


@device_function
def row_of_16(values, start, ahead, local, first, last, panels, base, zero, sums, t, more):
    """Four nonzeros at a time."""
    a = zeros(panels)
    if more:
        a = load(sums, t)
    rest = (last - first) & 3
    w, j = _or_nothing(values, start, local, first, rest > 0, base, 16, zero)
    b = mul(w, load(panels, j))
    w, j = _or_nothing(values, start, local, first + 1, rest > 1, base, 16, zero)
    c = mul(w, load(panels, j))
    w, j = _or_nothing(values, start, local, first + 2, rest > 2, base, 16, zero)
    d = mul(w, load(panels, j))
    k = first + rest
    while k < last:
        prefetch(values, ahead + k)
        a = fma(splat(at(values, start + k)), load(panels, base + np.intp(at(local, k)) * 16), a)
        b = fma(splat(at(values, start + k + 1)), load(panels, base + np.intp(at(local, k + 1)) * 16), b)
        c = fma(splat(at(values, start + k + 2)), load(panels, base + np.intp(at(local, k + 2)) * 16), c)
        d = fma(splat(at(values, start + k + 3)), load(panels, base + np.intp(at(local, k + 3)) * 16), d)
        k = hidden(k + 4)
    store(sums, t, add(add(a, b), add(c, d)))
