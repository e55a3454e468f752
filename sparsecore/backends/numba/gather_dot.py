"""Dot products of rows of sparse tables, which are never stored as dense rows.

Rows of a bitmap index that have many columns in common are expanded 16 columns at a time, in registers. Of rows that
have few, only the columns that both store are looked at: half of the pairs of rows of 64 columns and density 0.1 have
none, and nothing of their values is read.

Memory is asked for in two steps, as by `gather`, for both tables.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.addresses import address
from sparsecore.backends.numba.embedding import masks_of, prefetch_row, row_of
from sparsecore.backends.numba.jit import array, device_function, kernel, share_out, threads
from sparsecore.backends.numba.lanes_rows import dot_of_row
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.processor import INDEX_AHEAD, VALUES_AHEAD, has_avx2
from sparsecore.backends.numba.simd import (
    LANES,
    add,
    at,
    bits,
    bits64,
    count,
    expand,
    fma,
    horizontal_sum,
    prefetch_far,
    put,
    zeros,
)
from sparsecore.encoding import words
from sparsecore.errors import SparsecoreError

__all__ = ["gather_dot"]

# Columns of two rows that are looked at one by one, in tables that no cache holds: a shared column costs about 5 ns, a
# vector of each row 3.5; where the values need not be read, memory's time pays for the difference.
_FEW, _CACHED = 6, 16 << 20
# With AVX2, where lanes are permuted, an expansion takes longer: shared columns then are few in any table if they are
# this part of all (Zen 3: a shared column costs about 2 ns, a vector 4).
_AVX2, _PART = has_avx2(), 1 / 6


def gather_dot(
    values_a: Tensor,
    crow_a: Tensor,
    col_a: Tensor | None,
    ids_a: Tensor,
    values_b: Tensor,
    crow_b: Tensor,
    col_b: Tensor | None,
    ids_b: Tensor,
    n_cols: int,
) -> Tensor:
    """``a[ids_a[e]] . b[ids_b[e, j]]`` for ids_a (n,) and ids_b (n,) or (n, m): of the shape of ids_b."""
    out = torch.empty(ids_b.shape, dtype=values_a.dtype, device="cpu")
    n = threads(ids_b.numel() * n_cols)
    each = ids_b.shape[1] if ids_b.dim() == 2 else 1
    # One number for both: fewer kernels.
    lines = max(row_of(values_a, crow_a, n_cols), row_of(values_b, crow_b, n_cols))
    target, few = out.view(-1).numpy(), _share_few(values_a, crow_a, values_b, crow_b, n_cols)
    # One kernel reads both tables: of a CSR beside a bitmap, the rows that are looked up become a bitmap.
    if col_b is None and col_a is not None:
        crow_a, col_a, ids_a = _bitmap(crow_a, col_a, ids_a, n_cols, n)
    elif col_a is None and col_b is not None:
        crow_b, col_b, ids_b = _bitmap(crow_b, col_b, ids_b, n_cols, n)
    if col_a is None or col_b is None:
        a, b = array(crow_a), array(crow_b)
        tables = (array(values_a), a, masks_of(a), array(values_b), b, masks_of(b))
        # Pairs one by one: an inner loop over the rows of b took 1.2 to 1.4 times as long for single ones.
        left = array(ids_a if each == 1 else ids_a.repeat_interleave(each))
        right = array(ids_b).reshape(-1)
        if few:
            _dot_shared(*tables, left, right, n_cols, lines, target, n)
        else:
            _dot_bitmaps(*tables, left, right, n_cols, lines, target, n)
    else:
        tables = (array(values_a), array(crow_a), array(col_a), array(values_b), array(crow_b), array(col_b))
        ids = (array(ids_a), array(ids_b).reshape(-1))
        _dot_csr(*tables, *ids, each, n_cols, lines, target, workspace("dot", n, n_cols, values_a.dtype), n)
    return out


def _share_few(values_a: Tensor, crow_a: Tensor, values_b: Tensor, crow_b: Tensor, n_cols: int) -> bool:
    """Whether two rows have few columns in common, were each table's nonzeros anywhere, and (but with AVX2) the tables
    are large.
    """
    size = values_a.nbytes + crow_a.nbytes + (0 if values_a is values_b else values_b.nbytes + crow_b.nbytes)
    rows = max(1, crow_a.shape[0] - 1) * max(1, crow_b.shape[0] - 1)
    shared = values_a.numel() * values_b.numel() / (rows * n_cols)
    return shared <= _PART * n_cols if _AVX2 else size > _CACHED and shared <= _FEW


def _bitmap(
    crow: Tensor, col: Tensor, ids: Tensor, n_cols: int, n_chunks: int
) -> tuple[Tensor, None, Tensor]:
    """Index of the rows with these ids (or of all, where they are fewer), which points to the table's own values, and
    the ids in it.
    """
    if col.shape[0] >= 2**31:
        raise SparsecoreError(
            f"a bitmap beside a CSR of 2^31 nonzeros or more, which its pointers cannot count, got {col.shape[0]}: "
            "give both tables the csr encoding"
        )
    count = min(ids.numel(), crow.shape[0] - 1)
    every = torch.arange(count, device="cpu")
    encoded, found = (ids, every.view(ids.shape)) if count == ids.numel() else (every, ids)
    rows = torch.empty((count + 1, words(n_cols)), dtype=torch.int32, device="cpu")
    _encode_rows(array(crow), array(col), array(encoded).reshape(-1), rows.numpy(), n_chunks)
    return rows, None, found


@kernel
def _encode_rows(crow, col, ids, rows, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = ids.shape[0]
    end = n * (chunk + 1) // n_chunks
    for e in range(n * chunk // n_chunks, end):
        if e + INDEX_AHEAD < end:
            prefetch_far(crow, at(ids, e + INDEX_AHEAD))
        if e + VALUES_AHEAD < end:
            prefetch_far(col, at(crow, at(ids, e + VALUES_AHEAD)))
        rows[e] = 0
        first, last = crow[ids[e]], crow[ids[e] + 1]
        rows[e, 0] = first
        for k in range(first, last):
            j = np.int64(col[k])
            rows[e, 1 + (j >> 5)] |= np.int32(np.uint32(1) << np.uint32(j & 31))


@kernel
def _dot_bitmaps(
    values_a, index_a, masks_a, values_b, index_b, masks_b, ids_a, ids_b, d, lines, out, n_chunks, chunk
):  # fmt: skip
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = ids_a.shape[0]
    words, half_words = index_a.shape[1], masks_a.shape[1]  # both tables have the same columns
    blocks = d // LANES + (d % LANES > 0)
    first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
    for e in range(first, min(last, first + INDEX_AHEAD)):
        prefetch_far(index_a, at(ids_a, e) * words)
        prefetch_far(index_b, at(ids_b, e) * words)
    for e in range(first, last):
        if e + INDEX_AHEAD < last:
            prefetch_far(index_a, at(ids_a, e + INDEX_AHEAD) * words)
            prefetch_far(index_b, at(ids_b, e + INDEX_AHEAD) * words)
        if e + VALUES_AHEAD < last:
            prefetch_row(values_a, at(index_a, at(ids_a, e + VALUES_AHEAD) * words), lines)
            prefetch_row(values_b, at(index_b, at(ids_b, e + VALUES_AHEAD) * words), lines)
        r, s = at(ids_a, e), at(ids_b, e)
        k, m = at(index_a, r * words), r * half_words + 2
        q, o = at(index_b, s * words), s * half_words + 2
        even, odd = zeros(values_a), zeros(values_a)
        for b in range(0, blocks - 1, 2):
            u, v = bits(masks_a, m + b), bits(masks_b, o + b)
            even = fma(expand(values_a, k, u), expand(values_b, q, v), even)
            k, q = k + count(u), q + count(v)
            u, v = bits(masks_a, m + b + 1), bits(masks_b, o + b + 1)
            odd = fma(expand(values_a, k, u), expand(values_b, q, v), odd)
            k, q = k + count(u), q + count(v)
        if blocks % 2:
            u, v = bits(masks_a, m + blocks - 1), bits(masks_b, o + blocks - 1)
            even = fma(expand(values_a, k, u), expand(values_b, q, v), even)
        put(out, e, horizontal_sum(add(even, odd)))


@device_function
def _below(mask):
    """Bits below the lowest one that is set."""
    return (mask & (~mask + np.uint64(1))) - np.uint64(1)


@device_function
def _shared(values_a, k, u, values_b, q, v):
    """Sum over the columns that are set in both masks; k and q are the places of the masks' first values."""
    shared, total = u & v, values_a.dtype.type(0)
    while shared:
        below = _below(shared)
        total += at(values_a, k + count(u & below)) * at(values_b, q + count(v & below))
        shared &= shared - np.uint64(1)
    return total


@device_function
def _bits32(index, word):
    return np.uint64(np.uint32(at(index, word)))


@kernel
def _dot_shared(
    values_a, index_a, masks_a, values_b, index_b, masks_b, ids_a, ids_b, d, lines, out, n_chunks, chunk
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = ids_a.shape[0]
    words, half_words = index_a.shape[1], masks_a.shape[1]  # both tables have the same columns
    used = d // 32 + (d % 32 > 0)
    pairs, odd = used // 2, used % 2
    first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
    for e in range(first, min(last, first + INDEX_AHEAD)):
        prefetch_far(index_a, at(ids_a, e) * words)
        prefetch_far(index_b, at(ids_b, e) * words)
    for e in range(first, last):
        if e + INDEX_AHEAD < last:
            prefetch_far(index_a, at(ids_a, e + INDEX_AHEAD) * words)
            prefetch_far(index_b, at(ids_b, e + INDEX_AHEAD) * words)
        if e + VALUES_AHEAD < last:
            r, s = at(ids_a, e + VALUES_AHEAD), at(ids_b, e + VALUES_AHEAD)
            k, q = np.int64(at(index_a, r * words)), np.int64(at(index_b, s * words))
            if used <= 2:  # the masks are here already: nothing is asked for where nothing is shared
                if used == 2:
                    u, v = bits64(masks_a, r * half_words + 2), bits64(masks_b, s * half_words + 2)
                else:
                    u, v = _bits32(index_a, r * words + 1), _bits32(index_b, s * words + 1)
                shared = u & v
                if shared:
                    below = _below(shared)
                    prefetch_far(values_a, k + count(u & below))
                    prefetch_far(values_b, q + count(v & below))
                    prefetch_far(values_a, k + count(u) - 1)
                    prefetch_far(values_b, q + count(v) - 1)
            else:
                prefetch_row(values_a, k, lines)
                prefetch_row(values_b, q, lines)
        r, s = at(ids_a, e), at(ids_b, e)
        k, m = np.int64(at(index_a, r * words)), r * half_words + 2
        q, o = np.int64(at(index_b, s * words)), s * half_words + 2
        total = values_a.dtype.type(0)
        for b in range(pairs):
            u, v = bits64(masks_a, m + 4 * b), bits64(masks_b, o + 4 * b)
            total += _shared(values_a, k, u, values_b, q, v)
            k, q = k + count(u), q + count(v)
        if odd:
            u, v = _bits32(index_a, r * words + used), _bits32(index_b, s * words + used)
            total += _shared(values_a, k, u, values_b, q, v)
        put(out, e, total)


@kernel
def _dot_csr(
    values_a, crow_a, col_a, values_b, crow_b, col_b, ids_a, ids_b, each, d, lines, out, scratch, n_chunks, chunk
):  # fmt: skip
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = ids_a.shape[0]
    row = scratch[chunk]
    for j in range(d):
        row[j] = 0
    zero, column = values_b.dtype.type(0), col_b.dtype.type(0)
    places = address(values_b), address(col_b), address(row)
    limit = np.int64(at(crow_b, crow_b.shape[0] - 1))
    first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
    end = last * each
    for e in range(first, last):
        if e + INDEX_AHEAD < last:
            prefetch_far(crow_a, at(ids_a, e + INDEX_AHEAD))
        if e + VALUES_AHEAD < last:
            place = at(crow_a, at(ids_a, e + VALUES_AHEAD))
            prefetch_row(values_a, place, lines)
            prefetch_far(col_a, place)
        r = at(ids_a, e)
        for k in range(at(crow_a, r), at(crow_a, r + 1)):
            row[at(col_a, k)] = at(values_a, k)
        for j in range(e * each, (e + 1) * each):
            # Pair by pair: the many rows of an id to come, at once, would leave the nearest cache before they are read.
            if j + INDEX_AHEAD < end:
                prefetch_far(crow_b, at(ids_b, j + INDEX_AHEAD))
            if j + VALUES_AHEAD < end:
                place = at(crow_b, at(ids_b, j + VALUES_AHEAD))
                prefetch_row(values_b, place, lines)
                prefetch_far(col_b, place)
            s = at(ids_b, j)
            begin, behind = np.int64(at(crow_b, s)), np.int64(at(crow_b, s + 1))
            put(out, j, dot_of_row(places[0], begin, behind, limit, places[1], column, places[2], zero))
        for k in range(at(crow_a, r), at(crow_a, r + 1)):
            row[at(col_a, k)] = 0
