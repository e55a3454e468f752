"""Weighted sums of rows of a sparse table (a bag's rows), and their gradients.

Every bag, row and entry belongs to one thread and is summed in the order of the entries: results are the same on every
run and for every number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.embedding import lines_of, masks_of, prefetch_lines
from sparsecore.backends.numba.grouping import group
from sparsecore.backends.numba.jit import array, kernel, share_out, split, threads
from sparsecore.backends.numba.listing import by_columns
from sparsecore.backends.numba.memory import output
from sparsecore.backends.numba.scatter import gradient, sum_groups
from sparsecore.backends.numba.simd import (
    LANES,
    at,
    bits,
    count,
    first_lanes,
    fma,
    horizontal_sum,
    load,
    load_masked,
    prefetch_far,
    put,
    splat,
    store,
    store_masked,
    unpack,
    zeros,
)

__all__ = ["bag", "bag_dot", "bag_grad"]

_INDEX_AHEAD, _VALUES_AHEAD = 16, 8  # rows: wider than an embedding's, so fewer of them
_MOST_LINES = 32  # cache lines asked for of a row


def bag(
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor,
    n_cols: int,
) -> Tensor:
    """``out[b] = sum of weights[e] * table[ids[e]]`` over the entries e of bag b: dense (bags, cols)."""
    out = output((offsets.numel() - 1, n_cols), values.dtype)
    crow, col = by_columns(crow, col, n_cols, values.numel(), ids.numel())
    n = threads(_work(values, crow, ids) + out.numel())
    rest = (*map(array, (ids, offsets, weights)), out.numpy(), lines_of(values, crow, _MOST_LINES), n)
    if col is None:
        index = array(crow)
        _bag_bitmap(array(values), index, masks_of(index), *rest)
    else:
        _bag_csr(array(values), array(crow), array(col), *rest)
    return out


def bag_grad(
    crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    """``out[k] = sum of weights[e] * grad[bags[e], col[k]]`` over the entries e whose id is the row of nonzero k."""
    out = gradient(crow, nnz, grad.dtype)
    crow, col = by_columns(crow, col, grad.shape[1], nnz, ids.numel())
    sum_groups(crow, col, group(ids, crow.shape[0] - 1), array(bags), array(weights), grad, out)
    return out


def bag_dot(
    values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, grad: Tensor
) -> Tensor:
    """``out[e] = table[ids[e]] . grad[bags[e]]``: gradient of the entries' weights."""
    out = torch.empty(ids.numel(), dtype=values.dtype, device="cpu")
    crow, col = by_columns(crow, col, grad.shape[1], values.numel(), ids.numel())
    n = threads(_work(values, crow, ids))
    rest = (*map(array, (ids, bags, grad)), out.numpy(), lines_of(values, crow, _MOST_LINES), n)
    if col is None:
        index = array(crow)
        _dot_bitmap(array(values), index, masks_of(index), *rest)
    else:
        _dot_csr(array(values), array(crow), array(col), *rest)
    return out


def _work(values: Tensor, crow: Tensor, ids: Tensor) -> int:
    return ids.numel() * (1 + values.numel() // max(1, crow.shape[0] - 1))


@kernel
def _bag_bitmap(values, index, masks, ids, offsets, weights, out, lines, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, d = ids.shape[0], out.shape[1]
    width, half_words = index.shape[1], masks.shape[1]
    blocks, tail = d // LANES, first_lanes(d % LANES)
    zero = zeros(values)
    for b in range(split(offsets, n_chunks, chunk), split(offsets, n_chunks, chunk + 1)):
        o = b * d
        for i in range(blocks):
            store(out, o + i * LANES, zero)
        if tail:
            store_masked(out, o + blocks * LANES, zero, tail)
        e, end = at(offsets, b), at(offsets, b + 1)
        while e < end:
            # Four rows at a time: a block of the sum is loaded and stored once for all of them.
            several = 4 if e + 4 <= end else 1
            for i in range(several):
                prefetch_far(index, at(ids, min(e + i + _INDEX_AHEAD, n - 1)) * width)
                ahead = at(index, at(ids, min(e + i + _VALUES_AHEAD, n - 1)) * width)
                prefetch_lines(values, ahead, lines)
            r0, w0 = at(ids, e), splat(at(weights, e))
            k0, m0 = np.int64(at(index, r0 * width)), r0 * half_words + 2
            if several == 1:
                for i in range(blocks):
                    mask = bits(masks, m0 + i)
                    store(out, o + i * LANES, fma(w0, unpack(values, k0, mask), load(out, o + i * LANES)))
                    k0 += count(mask)
                if tail:
                    last, rest = o + blocks * LANES, unpack(values, k0, bits(masks, m0 + blocks))
                    store_masked(out, last, fma(w0, rest, load_masked(out, last, tail)), tail)
                e += 1
                continue
            r1, w1 = at(ids, e + 1), splat(at(weights, e + 1))
            r2, w2 = at(ids, e + 2), splat(at(weights, e + 2))
            r3, w3 = at(ids, e + 3), splat(at(weights, e + 3))
            k1, m1 = np.int64(at(index, r1 * width)), r1 * half_words + 2
            k2, m2 = np.int64(at(index, r2 * width)), r2 * half_words + 2
            k3, m3 = np.int64(at(index, r3 * width)), r3 * half_words + 2
            for i in range(blocks + (tail != 0)):
                lanes = first_lanes(min(LANES, d - i * LANES))
                a0, a1, a2, a3 = (
                    bits(masks, m0 + i),
                    bits(masks, m1 + i),
                    bits(masks, m2 + i),
                    bits(masks, m3 + i),
                )
                s = fma(w0, unpack(values, k0, a0), load_masked(out, o + i * LANES, lanes))
                s = fma(w1, unpack(values, k1, a1), s)
                s = fma(w2, unpack(values, k2, a2), s)
                s = fma(w3, unpack(values, k3, a3), s)
                store_masked(out, o + i * LANES, s, lanes)
                k0, k1, k2, k3 = k0 + count(a0), k1 + count(a1), k2 + count(a2), k3 + count(a3)
            e += 4


@kernel
def _bag_csr(values, crow, col, ids, offsets, weights, out, lines, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, d = ids.shape[0], out.shape[1]
    for b in range(split(offsets, n_chunks, chunk), split(offsets, n_chunks, chunk + 1)):
        o = b * d
        for j in range(d):
            put(out, o + j, values.dtype.type(0))
        for e in range(at(offsets, b), at(offsets, b + 1)):
            prefetch_far(crow, at(ids, min(e + _INDEX_AHEAD, n - 1)))
            ahead = at(crow, at(ids, min(e + _VALUES_AHEAD, n - 1)))
            prefetch_lines(values, ahead, lines)
            prefetch_far(col, ahead)
            r, w = at(ids, e), at(weights, e)
            for k in range(at(crow, r), at(crow, r + 1)):
                j = o + at(col, k)
                put(out, j, at(out, j) + w * at(values, k))


@kernel
def _dot_bitmap(values, index, masks, ids, bags, grad, out, lines, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, d = ids.shape[0], grad.shape[1]
    width, half_words = index.shape[1], masks.shape[1]
    blocks, tail = d // LANES, first_lanes(d % LANES)
    for e in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
        prefetch_far(index, at(ids, min(e + _INDEX_AHEAD, n - 1)) * width)
        prefetch_lines(values, at(index, at(ids, min(e + _VALUES_AHEAD, n - 1)) * width), lines)
        r, g = at(ids, e), at(bags, e) * d
        k, m = np.int64(at(index, r * width)), r * half_words + 2
        total = zeros(values)
        for i in range(blocks):
            mask = bits(masks, m + i)
            total = fma(unpack(values, k, mask), load(grad, g + i * LANES), total)
            k += count(mask)
        if tail:
            rest = unpack(values, k, bits(masks, m + blocks))
            total = fma(rest, load_masked(grad, g + blocks * LANES, tail), total)
        put(out, e, horizontal_sum(total))


@kernel
def _dot_csr(values, crow, col, ids, bags, grad, out, lines, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, d = ids.shape[0], grad.shape[1]
    for e in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
        prefetch_far(crow, at(ids, min(e + _INDEX_AHEAD, n - 1)))
        ahead = at(crow, at(ids, min(e + _VALUES_AHEAD, n - 1)))
        prefetch_lines(values, ahead, lines)
        prefetch_far(col, ahead)
        r, g = at(ids, e), at(bags, e) * d
        total = values.dtype.type(0)
        for k in range(at(crow, r), at(crow, r + 1)):
            total += at(values, k) * at(grad, g + at(col, k))
        put(out, e, total)
