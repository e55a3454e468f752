"""Scores of a whole table fused with top-k: the (queries, rows) matrix never exists.

16, 64 or 128 queries are the lanes of registers, their panel (columns x queries) lies in the nearest cache, and the
nonzeros of one row of the table after the other are multiplied in. A row's scores are compared with each query's k-th
best so far; they are seldom better (about ``k ln(rows / k)`` times for a query), and only then leave the registers,
into a heap.

Scores are summed in the order of the columns, even and odd nonzeros apart, and equal scores are ordered by id: the
result is the same for any number of threads. A score that is NaN or -inf is never among the best.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.heaps import begin_heaps, empty_heap, sink
from sparsecore.backends.numba.jit import array, device_function, kernel, share_out, threads
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.processor import has_avx2
from sparsecore.backends.numba.simd import (
    at,
    bits,
    bits64,
    compress,
    count,
    first_lanes,
    fma,
    greater,
    load,
    lowest,
    positions,
    prefetch,
    put,
    splat,
    store,
    store_masked,
    sum_of_each,
    unpack,
    zeros,
)  # fmt: skip
from sparsecore.backends.numba.tuples import add_each, any_greater, fma_each, store_each, zero_each

__all__ = ["score_topk"]

_AVX2 = has_avx2()
_ROWS, _NONZEROS = 1024, 8192  # of the table, whose columns are spread out at a time
_FEW = 2  # queries from a bitmap: for so few, expanded rows are faster than lanes that stay empty,
_CROWDED = 0.4  # where AVX2 expands, from this density on
_AHEAD = 1024  # values that are asked for early: without it, one query takes three times as long
_PANEL_BYTES = 1 << 15  # of 128 queries, to stay in the nearest cache; wider ones are taken by 64
_HEAP_BYTES = 1 << 22  # of the queries that one pass over the table serves


def score_topk(
    queries: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    k: int,
    seen_crow: Tensor | None,
    seen_col: Tensor | None,
    n_cols: int,
) -> tuple[Tensor, Tensor]:
    """Scores (B, k) and row ids (B, k) of the k best rows for each query, best first."""
    n, n_rows, item = queries.shape[0], crow.shape[0] - 1, values.element_size()
    scores = torch.empty((n, k), dtype=queries.dtype, device="cpu")
    ids = torch.empty((n, k), dtype=torch.int64, device="cpu")
    lanes = 128 if n > 64 and 128 * n_cols * item <= _PANEL_BYTES else 64 if n > 16 else 16
    index, kept = array(crow), min(k, n_rows)
    columns = index.view(np.uint16) if col is None else array(col)
    seen = [np.zeros(n + 1, np.int64), np.zeros(0, np.int64)]
    if seen_crow is not None and seen_col is not None:
        seen = [array(seen_crow.long()), array(seen_col.long())]  # one type: kernels are compiled for each
    n_chunks = threads(n * values.numel())
    if n <= _FEW and col is None and not (_AVX2 and values.numel() < _CROWDED * n_rows * n_cols):
        padded = queries.new_zeros(n, -(-n_cols // 16) * 16)
        padded[:, :n_cols] = queries
        found = np.empty((n_chunks, n, kept), padded.numpy().dtype), np.empty((n_chunks, n, kept), np.int64)
        scratch = _heaps(n_chunks, n, kept, 256 + 16, padded.dtype)
        _scan_few(array(padded), array(values), index, columns, *seen, n_cols, *scratch, *found, n_chunks)
        _merge(*found, 0, _nexts(1, n_chunks), scores.numpy(), ids.numpy(), 1)
        return scores, ids
    step = max(1, _HEAP_BYTES // (lanes * max(kept, 1) * (item + 8))) * lanes
    for begin in range(0, n, step):
        size = min(step, n - begin)
        panels = -(-size // lanes)
        padded = queries.new_zeros(panels * lanes, n_cols)
        padded[:size] = queries[begin : begin + size]
        panel = array(padded.view(panels, lanes, n_cols).transpose(1, 2))
        # Panels are shared out where that comes out even: heaps of half the rows let twice as many in.
        parts = n_chunks // math.gcd(n_chunks, panels)
        found = np.empty((parts, size, kept), panel.dtype), np.empty((parts, size, kept), np.int64)
        served = panels // (n_chunks // parts) * lanes
        offsets = workspace("offsets", n_chunks, _NONZEROS + 2 * n_cols + 32, torch.int32)
        _scan(
            panel.reshape(-1), tuple(range(0, lanes, 16)), array(values), index, columns, *seen, begin, n_cols,
            *_heaps(n_chunks, served, kept, lanes, padded.dtype), offsets, *found, n_chunks,
        )  # fmt: skip
        chunks = n_chunks if size > n_chunks else 1
        _merge(*found, begin, _nexts(chunks, parts), scores.numpy(), ids.numpy(), chunks)
    return scores, ids


def _heaps(n_chunks: int, n: int, k: int, more: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scratch for a chunk's heaps: scores, the worst of each and ``more`` numbers; ids."""
    scores = workspace("heap scores", n_chunks, n * (k + 1) + more, dtype)
    return scores, workspace("heap ids", n_chunks, n * k, torch.int64)


def _nexts(n_chunks: int, parts: int) -> np.ndarray:
    return workspace("nexts", n_chunks, parts, torch.int64)


@device_function
def _is_seen(seen_crow, seen_col, query, row):
    """Binary search in the ascending ids of a query."""
    low, high = np.int64(seen_crow[query]), np.int64(seen_crow[query + 1])
    last = high
    while low < high:
        middle = (low + high) // 2
        if seen_col[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low < last and seen_col[low] == row


@device_function
def _first_row(crow, words, n_chunks, chunk):
    """Rows are split so that rows + nonzeros are even."""
    n_rows = crow.shape[0] - 1
    target = (np.int64(at(crow, n_rows * words)) + n_rows) * chunk // n_chunks
    low, high = 0, n_rows
    while low < high:
        middle = (low + high) // 2
        if np.int64(at(crow, middle * words)) + middle >= target:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def _scan(
    panel, places, values, crow, col, seen_crow, seen_col, begin, d, heap_scores, heap_ids, offsets, found_scores,
    found_rows, n_chunks, chunk,
):  # fmt: skip
    """The best of each chunk of rows, best first."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n_parts, n, k = found_scores.shape
    lanes, words = 16 * len(places), crow.size // crow.shape[0]
    n_groups = n_chunks // n_parts
    n_panels = panel.size // (d * lanes) // n_groups
    part, skipped = chunk % n_parts, chunk // n_parts * n_panels * lanes  # queries of the groups before
    here = min(n - skipped, n_panels * lanes)
    held, end = n_panels * lanes * k, n_panels * lanes * (k + 1)
    scores, rows = heap_scores[chunk, :held], heap_ids[chunk, :held]
    worst, row_scores = heap_scores[chunk, held:end], heap_scores[chunk, end:]
    begin_heaps(scores, rows, worst)
    for query in range(here, n_panels * lanes):
        put(worst, query, panel.dtype.type(np.inf))  # lanes without a query let nothing in
    offsets = offsets[chunk]
    starts = offsets[_NONZEROS + d + 16 :]
    for c in range((d + 15) // 16 * 16):
        put(starts, c, np.int32(c * lanes))
    # Numbers of columns move as the bits of floats.
    as_floats, starts = offsets.view(np.float32), starts.view(np.float32)
    row, last_row = _first_row(crow, words, n_parts, part), _first_row(crow, words, n_parts, part + 1)
    while row < last_row:
        # Columns of the next rows, as places in a panel.
        first, first_value = row, np.int64(at(crow, row * words))
        while (
            row < last_row
            and row - first < _ROWS
            and np.int64(at(crow, row * words)) - first_value < _NONZEROS
        ):
            m = np.int64(at(crow, row * words)) - first_value
            if col.ndim == 1:
                for e in range(m, np.int64(at(crow, row + 1)) - first_value):
                    put(offsets, e, np.int32(np.int64(at(col, first_value + e)) * lanes))
            elif _AVX2:
                for c in range(0, d, 64):
                    word = row * words + 1 + c // 32
                    mask = bits64(crow, word) if d - c > 32 else np.uint64(np.uint32(at(crow, word)))
                    positions(offsets, m, mask, c)
                    m += count(mask)
            else:
                for c in range(0, d, 16):
                    mask = bits(col, 2 * row * words + 2 + c // 16)
                    store_masked(as_floats, m, compress(load(starts, c), mask), first_lanes(count(mask)))
                    m += count(mask)
            row += 1
        if _AVX2 and col.ndim == 2:
            for e in range(np.int64(at(crow, row * words)) - first_value):
                put(offsets, e, at(offsets, e) * np.int32(lanes))
        for p in range(n_panels):
            base = (skipped + p * lanes) * d
            for r in range(first, row):
                e, end = np.int64(at(crow, r * words)), np.int64(at(crow, (r + 1) * words))
                prefetch(values, e + _AHEAD)
                prefetch(values, e + _AHEAD + 16)
                s, t = zero_each(places, panel), zero_each(places, panel)
                while e + 2 <= end:
                    place = np.int64(at(offsets, e - first_value))
                    other = np.int64(at(offsets, e + 1 - first_value))
                    s = fma_each(splat(at(values, e)), panel, base + place, s)
                    t = fma_each(splat(at(values, e + 1)), panel, base + other, t)
                    e += 2
                if e < end:
                    place = np.int64(at(offsets, e - first_value))
                    s = fma_each(splat(at(values, e)), panel, base + place, s)
                s = add_each(s, t)
                if any_greater(s, worst, p * lanes):
                    store_each(s, row_scores)
                    for z in range(0, lanes, 16):
                        better = greater(load(row_scores, z), load(worst, p * lanes + z))
                        while better:
                            lane = z + lowest(better)
                            better &= np.uint16(better - np.uint16(1))
                            query = p * lanes + lane
                            if not _is_seen(seen_crow, seen_col, begin + skipped + query, r):
                                sink(scores, rows, query * k, k, at(row_scores, lane), r)
                                put(worst, query, at(scores, query * k))
    for query in range(here):
        empty_heap(
            scores,
            rows,
            query * k,
            k,
            found_scores[part, skipped + query],
            found_rows[part, skipped + query],
        )


@kernel
def _scan_few(
    queries, values, crow, masks, seen_crow, seen_col, d, heap_scores, heap_ids, found_scores, found_rows,
    n_chunks, chunk,
):  # fmt: skip
    """For one or two queries and a bitmap: lanes are columns, and the sums of 16 rows at a time."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, k = found_scores.shape[1:]
    words, width = crow.shape[1], queries.shape[1]
    zero = zeros(queries)
    scores, rows = heap_scores[chunk, : n * k], heap_ids[chunk, : n * k]
    worst, sums = heap_scores[chunk, n * k : n * (k + 1)], heap_scores[chunk, n * (k + 1) :]
    begin_heaps(scores, rows, worst)
    for i in range(256):
        put(sums, i, queries.dtype.type(0))
    row_scores = sums[256:]
    last_row = _first_row(crow, words, n_chunks, chunk + 1)
    for first in range(_first_row(crow, words, n_chunks, chunk), last_row, 16):
        height = min(16, last_row - first)
        for query in range(n):
            for r in range(height):
                m, block = np.int64(at(crow, (first + r) * words)), 2 * (first + r) * words + 2
                s = zero
                prefetch(values, m + _AHEAD)
                prefetch(values, m + _AHEAD + 16)
                for c in range(0, d, 16):
                    mask = bits(masks, block + c // 16)
                    s = fma(load(queries, query * width + c), unpack(values, m, mask), s)
                    m += count(mask)
                store(sums, 16 * r, s)
            total = sum_of_each((
                load(sums, 0), load(sums, 16), load(sums, 32), load(sums, 48), load(sums, 64), load(sums, 80),
                load(sums, 96), load(sums, 112), load(sums, 128), load(sums, 144), load(sums, 160), load(sums, 176),
                load(sums, 192), load(sums, 208), load(sums, 224), load(sums, 240),
            ))  # fmt: skip
            better = greater(total, splat(at(worst, query))) & first_lanes(height)
            if better:
                store(row_scores, 0, total)
                while better:
                    r = lowest(better)
                    better &= np.uint16(better - np.uint16(1))
                    # The threshold may have risen since the comparison.
                    beats = at(row_scores, r) > at(worst, query)
                    if beats and not _is_seen(seen_crow, seen_col, query, first + r):
                        sink(scores, rows, query * k, k, at(row_scores, r), first + r)
                        put(worst, query, at(scores, query * k))
    for query in range(n):
        empty_heap(scores, rows, query * k, k, found_scores[chunk, query], found_rows[chunk, query])


@kernel
def _merge(found_scores, found_rows, begin, scratch, scores, rows, n_chunks, chunk):
    """The best of all chunks."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    parts, n, kept = found_scores.shape
    k = scores.shape[1]
    nexts = scratch[chunk]
    for query in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
        for part in range(parts):
            nexts[part] = 0
        for j in range(k):
            score, r, best = scores.dtype.type(-np.inf), np.int64(-1), -1
            for part in range(parts):
                if nexts[part] < kept:
                    s, i = found_scores[part, query, nexts[part]], found_rows[part, query, nexts[part]]
                    if s > score or (s == score and s > -np.inf and i < r):
                        score, r, best = s, i, part
            if best >= 0:
                nexts[best] += 1
            scores[begin + query, j], rows[begin + query, j] = score, r
