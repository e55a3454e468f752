"""Gradients of rows that were looked up, at the stored positions of a table.

Entries are grouped by row first (a stable radix sort), then every row of the table that occurs is summed once, in
registers, its entries in the order in which they came, and compressed to its stored columns. One thread owns a row, so
results are the same on every run and for every number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba import small
from sparsecore.backends.numba.embedding import lines_of, masks_of, prefetch_lines
from sparsecore.backends.numba.grouping import Groups, group, grouped_in
from sparsecore.backends.numba.jit import array, device_function, kernel, share_out, split, threads
from sparsecore.backends.numba.memory import is_kept, result_of, workspace
from sparsecore.backends.numba.processor import INDEX_AHEAD, VALUES_AHEAD
from sparsecore.backends.numba.simd import (
    LANES,
    add,
    at,
    bits,
    compress,
    count,
    first_lanes,
    fma,
    load,
    load_masked,
    prefetch_far,
    put,
    splat,
    store,
    store_masked,
    zeros,
)
from sparsecore.backends.numba.spans import Spans

__all__ = [
    "STRIP",
    "gradient",
    "pack_row",
    "scatter_grad",
    "sum_groups",
    "sum_rows",
    "take_row",
    "touched",
    "touched_spans",
]

_NONE = np.empty(0, np.int64)
STRIP = 4 * LANES  # numbers of scratch for the sums of four blocks of columns
_SPARSE = 8  # of so many columns one is stored where sums of single columns take as long as sums of all


def scatter_grad(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    """``out[k] = sum of grad[e, col[k]]`` over the entries e whose id is the row of nonzero k: (nnz,)."""
    out = gradient(crow, nnz, grad.dtype)
    if small.is_small_lookup(grad.numel(), grad.dtype):
        return small.scatter_grad_(out, crow, col, ids, grad)
    sum_groups(crow, col, group(ids, crow.shape[0] - 1), None, None, grad, out)
    return out


def gradient(crow: Tensor, nnz: int, dtype: torch.dtype) -> Tensor:
    """Zeros for a gradient of all values of the weight that has this index."""
    if not is_kept(nnz * dtype.itemsize):  # one call instead of two
        return crow.new_zeros(nnz, dtype=dtype)
    return result_of(crow, "gradient", (nnz,), dtype).zero_()


def touched(
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    nnz: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scatter_grad`` at the nonzeros of the rows that occur: their places (t,) int64, ascending, and values (t,).

    With sources and weights, entry e adds ``weights[e] * grad[sources[e]]``.
    """
    groups, spans = grouped_in(crow, ids)
    positions = torch.empty(int(spans.offsets[-1]), dtype=torch.int64, device="cpu")
    out = torch.empty(positions.numel(), dtype=grad.dtype, device="cpu")
    parts = (None, None) if sources is None or weights is None else (array(sources), array(weights))
    sum_groups(crow, col, groups, *parts, grad, out, spans.offsets, positions.numpy())
    return positions, out


def touched_spans(
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    sources: Tensor | None,
    weights: Tensor | None,
) -> tuple[Spans, Tensor]:
    """`touched` with its places as spans: the numbers lie in scratch, until this thread's next call."""
    groups, spans = grouped_in(crow, ids)
    out = torch.from_numpy(workspace("touched", 1, int(spans.offsets[-1]), grad.dtype)[0])
    out = out[: int(spans.offsets[-1])]
    parts = (None, None) if sources is None or weights is None else (array(sources), array(weights))
    sum_groups(crow, col, groups, *parts, grad, out, spans.offsets)
    return spans, out


def sum_rows(ids: Tensor, grad: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Distinct ids, ascending, and the sum of each one's rows of ``grad`` (n, cols)."""
    rows, starts, order = group(ids, n_rows)
    out = torch.empty((rows.shape[0], grad.shape[1]), dtype=grad.dtype, device="cpu")
    _sum_dense(starts, order, array(grad), out.numpy(), threads(grad.numel()))
    return torch.from_numpy(rows), out


def sum_groups(
    crow: Tensor,
    col: Tensor | None,
    groups: Groups,
    bags: np.ndarray | None,
    weights: np.ndarray | None,
    grad: Tensor,
    out: Tensor,
    place: np.ndarray = _NONE,
    positions: np.ndarray = _NONE,
) -> None:
    """Weighted sums of rows of ``grad`` (entry e takes row ``bags[e]``), compressed, where their row's values lie.

    Without bags and weights, entry e takes row e, once. With ``place``, group u is written from ``place[u]`` on instead
    and (with ``positions``) the places of its values in the table to there.
    """
    rows, starts, order = groups
    summands = array(grad)
    source, weighted, step = order, np.ones(1, summands.dtype), 0
    if bags is not None and weights is not None:
        source, weighted, step = bags[order], weights[order], 1
    target, lines, n = out.numpy(), lines_of(out, crow), threads(order.shape[0] * grad.shape[1])
    rest = (rows, starts, source, weighted, step, summands, place, positions, target, lines, n)
    if col is None:
        index = array(crow)
        _sum_bitmap(index, masks_of(index), *rest)
    else:
        strip = workspace("strip", n, STRIP, out.dtype)
        _sum_csr(array(crow), array(col), strip, *rest)


@device_function
def _pack(out, k, block, mask):
    """Write the stored columns of a block; the next place."""
    stored = count(mask)
    store_masked(out, k, compress(block, mask), first_lanes(stored))
    return k + stored


@device_function
def _sum_four(source, weights, step, begin, end, grad, d, b):
    """Weighted sums of the entries' rows, of four blocks of 16 columns from block b on."""
    s0 = s1 = s2 = s3 = zeros(grad)
    for e in range(begin, end):
        g = np.int64(at(source, e)) * d + b * LANES
        w = splat(at(weights, e * step))
        s0 = fma(w, load(grad, g), s0)
        s1 = fma(w, load(grad, g + 16), s1)
        s2 = fma(w, load(grad, g + 32), s2)
        s3 = fma(w, load(grad, g + 48), s3)
    return s0, s1, s2, s3


@device_function
def _sum_block(source, weights, step, begin, end, grad, d, b):
    """The same of one block, of which the last one of a row may have less than 16 columns."""
    lanes = first_lanes(min(LANES, d - b * LANES))
    s = zeros(grad)
    for e in range(begin, end):
        g = np.int64(at(source, e)) * d + b * LANES
        s = fma(splat(at(weights, e * step)), load_masked(grad, g, lanes), s)
    return s


@device_function
def pack_row(masks, m, source, weights, step, begin, end, grad, d, out, k):
    """Sum of the entries begin .. end, at the columns that a bitmap's row stores, to ``out[k:]``; the next place."""
    blocks = d // LANES
    fours = blocks // 4 * 4
    for b in range(0, fours, 4):
        s0, s1, s2, s3 = _sum_four(source, weights, step, begin, end, grad, d, b)
        k = _pack(out, k, s0, bits(masks, m + b))
        k = _pack(out, k, s1, bits(masks, m + b + 1))
        k = _pack(out, k, s2, bits(masks, m + b + 2))
        k = _pack(out, k, s3, bits(masks, m + b + 3))
    for b in range(fours, blocks + (d % LANES != 0)):
        s = _sum_block(source, weights, step, begin, end, grad, d, b)
        k = _pack(out, k, s, bits(masks, m + b))
    return k


@device_function
def take_row(col, first, stored, source, weights, step, begin, end, grad, d, out, place, strip):
    """Sum of the entries begin .. end, at ``stored`` columns from ``col[first]`` on, to ``out[place:]``. ``strip`` is
    scratch of `STRIP` numbers.
    """
    if end - begin > 1 and stored * _SPARSE > d:
        _take_from_sums(col, first, stored, source, weights, step, begin, end, grad, d, out, place, strip)
        return
    g, w = np.int64(at(source, begin)) * d, at(weights, begin * step)
    for i in range(stored):
        put(out, place + i, w * at(grad, g + at(col, first + i)))
    for e in range(begin + 1, end):
        g, w = np.int64(at(source, e)) * d, at(weights, e * step)
        for i in range(stored):
            put(out, place + i, at(out, place + i) + w * at(grad, g + at(col, first + i)))


@device_function
def _take_from_sums(col, first, stored, source, weights, step, begin, end, grad, d, out, place, strip):
    """`take_row` by the sums of all columns, in registers, of which those that are stored are taken."""
    blocks, taken = d // LANES, 0
    fours = blocks // 4 * 4
    for b in range(0, fours, 4):
        s0, s1, s2, s3 = _sum_four(source, weights, step, begin, end, grad, d, b)
        store(strip, 0, s0)
        store(strip, 16, s1)
        store(strip, 32, s2)
        store(strip, 48, s3)
        taken = _take(col, first, stored, taken, b * LANES, STRIP, strip, out, place)
    for b in range(fours, blocks + (d % LANES != 0)):
        s = _sum_block(source, weights, step, begin, end, grad, d, b)
        store(strip, 0, s)
        taken = _take(col, first, stored, taken, b * LANES, LANES, strip, out, place)


@device_function
def _take(col, first, stored, taken, start, width, strip, out, place):
    """Write the columns start .. start + width of a row that are stored; how many of the row have been taken then."""
    while taken < stored and np.int64(at(col, first + taken)) < start + width:
        put(out, place + taken, at(strip, np.int64(at(col, first + taken)) - start))
        taken += 1
    return taken


@kernel
def _sum_bitmap(
    index, masks, rows, starts, source, weights, step, grad, place, positions, out, lines, n_chunks, chunk
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = grad.shape[1]
    width, half_words = index.shape[1], masks.shape[1]
    grad_lines = min(8, -(-d * grad.itemsize // 64))
    first, last = split(starts, n_chunks, chunk), split(starts, n_chunks, chunk + 1)
    for u in range(first, min(last, first + INDEX_AHEAD)):
        prefetch_far(index, at(rows, u) * width)
    for u in range(first, last):
        if u + INDEX_AHEAD < last:
            prefetch_far(index, at(rows, u + INDEX_AHEAD) * width)
        if u + VALUES_AHEAD < last:
            if place.shape[0] == 0:
                prefetch_lines(out, at(index, at(rows, u + VALUES_AHEAD) * width), lines)
            prefetch_lines(grad, np.int64(at(source, at(starts, u + VALUES_AHEAD))) * d, grad_lines)
        r = at(rows, u)
        k = np.int64(at(index, r * width))
        m = r * half_words + 2
        if place.shape[0]:
            o, end = at(place, u), at(place, u + 1)
            if positions.shape[0]:
                for i in range(end - o):
                    put(positions, o + i, k + i)
            k = o
        begin, end = np.int64(at(starts, u)), np.int64(at(starts, u + 1))
        pack_row(masks, m, source, weights, step, begin, end, grad, d, out, k)


@kernel
def _sum_csr(
    crow, col, strip, rows, starts, source, weights, step, grad, place, positions, out, lines, n_chunks, chunk
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = grad.shape[1]
    first, last = split(starts, n_chunks, chunk), split(starts, n_chunks, chunk + 1)
    for u in range(first, min(last, first + INDEX_AHEAD)):
        prefetch_far(crow, at(rows, u))
    for u in range(first, last):
        if u + INDEX_AHEAD < last:
            prefetch_far(crow, at(rows, u + INDEX_AHEAD))
        if u + VALUES_AHEAD < last:
            ahead = at(crow, at(rows, u + VALUES_AHEAD))
            prefetch_lines(col, ahead, 2)
            if place.shape[0] == 0:
                prefetch_lines(out, ahead, lines)
        r = at(rows, u)
        k, stored = np.int64(at(crow, r)), np.int64(at(crow, r + 1)) - np.int64(at(crow, r))
        o = k
        if place.shape[0]:
            o = at(place, u)
            if positions.shape[0]:
                for i in range(stored):
                    put(positions, o + i, k + i)
        begin, end = np.int64(at(starts, u)), np.int64(at(starts, u + 1))
        take_row(col, k, stored, source, weights, step, begin, end, grad, d, out, o, strip[chunk])


@kernel
def _sum_dense(starts, order, grad, out, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = grad.shape[1]
    for u in range(split(starts, n_chunks, chunk), split(starts, n_chunks, chunk + 1)):
        for b in range(0, d, LANES):
            lanes, s = first_lanes(min(LANES, d - b)), zeros(grad)
            for e in range(at(starts, u), at(starts, u + 1)):
                s = add(s, load_masked(grad, np.int64(at(order, e)) * d + b, lanes))
            store_masked(out, u * d + b, s, lanes)
