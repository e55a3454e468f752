"""Dense products of blocks of W that are spread out in scratch, zeros included: for dense weights and large batches.

A block has at most 256 terms of a sum and 128 of its results, 128 KiB of float32. Its *slabs* are 16 results wide, and
one of them, (terms, 16), stays in the first-level cache while up to 516 examples are multiplied with it (`multiply`).
Activations are packed first, `ROWS` examples side by side: where they lie, in as many rows as there are examples, it
takes longer to read them. Results are summed in scratch too: each belongs to one thread, and so does a row of the
gradient, so that they do not depend on the number of threads. An infinite number times a zero of a block is NaN, as in
a dense product.
"""

from __future__ import annotations

import torch

from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.multiply import ROWS, copy_rows, multiply
from sparsecore.backends.numba.panels import pointer
from sparsecore.backends.numba.simd import (
    add,
    at,
    first_lanes,
    load,
    load_masked,
    prefetch,
    put,
    store,
    store_masked,
    transpose,
)
from sparsecore.backends.numba.stored_rows import ask, collect_rows, reach, spread_rows

_TERMS = 256  # of a sum at a time, at most (of float64 half as many); a multiple of 16
_GROUP = 128  # columns of a result at a time; a multiple of 16
_EXAMPLES = 86 * ROWS  # at a time: their results, _GROUP wide, take 258 KiB of float32
_PACKED = 1 << 20  # numbers of activations, which the shared cache holds
_ACROSS = 64  # columns of W whose gradient is summed at a time; a multiple of 16
_HEIGHT = 32 * ROWS  # ... and rows
_TURNED = 32  # examples of them that are packed at a time: the same cache lines have the rows beside


def spmm(values, crow, col, x, y, n_chunks):
    own = -(-y.shape[1] // (16 * n_chunks)) * 16 + 16  # rows of a chunk, at most
    _in_parts(_spmm, values, crow, col, x, y, own, n_chunks)


def spmm_t(values, crow, col, dy, dx, n_chunks):
    _in_parts(_spmm_t, values, crow, col, dy, dx, dy.shape[1], n_chunks)


def _in_parts(add_products, values, crow, col, given, out, reached, n_chunks):
    """Some examples after the other, and some terms of their sums: so many as are packed at a time."""
    batch, width = given.shape
    kind, part = torch.from_numpy(given).dtype, _part(batch)
    terms = _terms(width, kind)
    step = max(1, _PACKED // part // terms) * terms
    packed = workspace("packed", 1, part * min(step, width), kind)[0]
    # Room for a block, its slabs and results, and the nonzeros that were reached in the rows of W.
    scratch = (
        workspace("block", n_chunks, _TERMS * _GROUP, kind),
        workspace("slabs", n_chunks, _TERMS * _GROUP, kind),
        workspace("results", n_chunks, part * _GROUP, kind),
        workspace("places", n_chunks, reached, torch.int64),
    )
    for p in range(0, batch, part):
        some, results = given[p : p + part], out[p : p + part]
        for first in range(0, width, step):
            last = min(first + step, width)
            _pack(some, first, last, packed, n_chunks)
            add_products(values, crow, col, packed, first, last, terms, results, *scratch, n_chunks)


def sddmm(crow, col, dy, x, out, n_chunks):
    dtype, part = torch.from_numpy(x).dtype, _part(len(x))
    turned = workspace("turned dY", n_chunks, _HEIGHT * part, dtype)
    slabs = workspace("slabs", n_chunks, _TERMS * _GROUP, dtype)
    sums = workspace("results", n_chunks, _HEIGHT * _ACROSS, dtype)
    places = workspace("places", n_chunks, _HEIGHT, torch.int64)
    _sddmm(crow, col, dy, x, out, part, _terms(part, dtype), turned, slabs, sums, places, n_chunks)


def _part(batch: int) -> int:
    """Examples at a time, a multiple of ROWS: parts of a batch that are about equal."""
    parts = -(-batch // _EXAMPLES)
    return -(-batch // (parts * ROWS)) * ROWS


def _terms(width: int, kind: torch.dtype) -> int:
    """Terms of a block, a multiple of 16: blocks that are about equal, and slabs of 16 KiB at most."""
    blocks = -(-width // (_TERMS * 4 // kind.itemsize))
    return -(-width // (blocks * 16)) * 16


@kernel
def _pack(x, first, last, packed, n_chunks, chunk):
    """packed[e // ROWS, k - first, e % ROWS] = x[e, k]; 0 for examples that there are not."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch, width = x.shape
    numbers, terms, tiles = x.reshape(-1), last - first, -(-batch // ROWS)
    for tile in range(tiles * chunk // n_chunks, tiles * (chunk + 1) // n_chunks):
        place, to = tile * ROWS * width + first, tile * ROWS * terms
        here = min(ROWS, batch - tile * ROWS)
        if here == ROWS:
            for k in range(terms):
                for e in range(ROWS):
                    put(packed, to + k * ROWS + e, at(numbers, place + e * width + k))
        else:
            packed[to : to + ROWS * terms] = 0
            for k in range(terms):
                for e in range(here):
                    put(packed, to + k * ROWS + e, at(numbers, place + e * width + k))


@kernel
def _spmm(
    values, crow, col, packed, first, last, step, y, blocks, slabs_, results_, places_, n_chunks, chunk
):  # fmt: skip
    """Add products of the terms from ``first`` to ``last``, ``step`` of them a block."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    examples, rows = y.shape
    block, slabs, results, places = blocks[chunk], slabs_[chunk], results_[chunk], places_[chunk]
    begin, end, low, high = _share(rows, examples, n_chunks, chunk)
    if first == 0:
        for r in range(begin, end):
            places[r - begin] = pointer(crow, r)
    for r in range(begin, end, _GROUP):
        n = min(_GROUP, end - r)
        own = (low if r == begin else 0, high if r + n == end else examples)
        reached = places[r - begin : r - begin + n]
        results[:] = 0
        for c in range(first, last, step):
            terms = min(step, last - c)
            spread_rows(values, crow, col, r, n, c, terms, reached, block, _TERMS)
            for u in range(0, n, 16):
                for j in range(0, terms, 16):
                    transpose(block, u * _TERMS + j, _TERMS, slabs, u * _TERMS + j * 16, 16)
            _multiply_all(
                packed, last - first, c - first, examples, own, terms, n, slabs, results,
                values, col, reached, n, terms,
            )  # fmt: skip
        _write(results, examples, own, n, y, r, first > 0)


@kernel
def _spmm_t(
    values, crow, col, packed, first, last, step, dx, blocks, slabs_, results_, places_, n_chunks, chunk
):  # fmt: skip
    if chunk < 0:
        return share_out(chunk, n_chunks)
    examples, cols = dx.shape
    block, slabs, results, places = blocks[chunk], slabs_[chunk], results_[chunk], places_[chunk]
    begin, end, low, high = _share(cols, examples, n_chunks, chunk)
    if first == 0:
        reach(crow, col, begin, places)
    for c in range(begin, end, _GROUP):
        n = min(_GROUP, end - c)
        own = (low if c == begin else 0, high if c + n == end else examples)
        results[:] = 0
        for r in range(first, last, step):
            terms = min(step, last - r)
            spread_rows(values, crow, col, r, terms, c, n, places[r : r + terms], block, _GROUP)
            for i in range(terms):
                for u in range(0, n, 16):
                    store(slabs, u * _TERMS + i * 16, load(block, i * _GROUP + u))
            below = places[r + terms : r + terms + step]
            _multiply_all(
                packed, last - first, r - first, examples, own, terms, n, slabs, results,
                values, col, below, min(step, last - r - terms), n,
            )  # fmt: skip
        _write(results, examples, own, n, dx, c, first > 0)


@device_function
def _share(size, examples, n_chunks, chunk):
    """A chunk's columns of a result: the first and the end; of its first slab the first example, of its last the end.

    Shared out are tiles, of ROWS examples and 16 columns: chunks have as many, where slabs are few.
    """
    slabs, tiles = (size + 15) // 16, (examples + ROWS - 1) // ROWS
    first, end = slabs * tiles * chunk // n_chunks, slabs * tiles * (chunk + 1) // n_chunks
    begin, last = first // tiles, (end + tiles - 1) // tiles
    return (
        begin * 16,
        min(size, last * 16) if end > first else begin * 16,
        (first - begin * tiles) * ROWS,
        min(examples, (end - (last - 1) * tiles) * ROWS),
    )


@device_function
def _up_to_16(array, place, there):
    return load(array, place) if there >= 16 else load_masked(array, place, first_lanes(there))


@device_function
def _multiply_all(
    packed, width, start, examples, own, terms, n, slabs, results, values, col, upcoming, n_upcoming, wide
):  # fmt: skip
    """Add the examples' products with n columns of slabs. Their terms begin with ``start`` of ``width`` packed ones.

    With the first slab examples begin at ``own[0]``, with the last they end at ``own[1]``.
    Meanwhile, ``wide`` values from each of the first ``n_upcoming`` upcoming nonzeros on are fetched, all or most.
    """
    done, share = 0, n_upcoming / (n * examples)  # of upcoming rows, for an example and a column
    for u in range(0, n, 16):
        for e in range(own[0] if u == 0 else 0, own[1] if u + 16 >= n else examples, ROWS):
            source = e * width + start * ROWS
            multiply(packed, source, 1, ROWS, slabs, u * _TERMS, results, e * _GROUP + u, _GROUP, terms)
            due = min(n_upcoming, int(share * (u * examples + 16 * e)) + 1)
            ask(values, col, upcoming, done, due, wide)
            done = due


@device_function
def _write(results, examples, own, n, out, first, more):
    """The results of n columns to columns ``first`` .. of ``out``, or added to what is there."""
    flat, width = out.reshape(-1), out.shape[1]
    for e in range(examples):
        t = e * width + first
        for u in range(0 if e >= own[0] else 16, n if e < own[1] else (n - 1) // 16 * 16, 16):
            sums = load(results, e * _GROUP + u)
            if more:
                sums = add(sums, _up_to_16(flat, t + u, n - u))
            if n - u >= 16:
                store(flat, t + u, sums)
            else:
                store_masked(flat, t + u, sums, first_lanes(n - u))


@kernel
def _sddmm(crow, col, dy, x, out, part, step, turned_, slabs_, sums_, places_, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch, cols = x.shape
    rows = dy.shape[1]
    left, right = dy.reshape(-1), x.reshape(-1)
    turned, slabs, sums, places = turned_[chunk], slabs_[chunk], sums_[chunk], places_[chunk]
    last = rows * (chunk + 1) // n_chunks
    for p in range(0, batch, part):
        examples = min(part, batch - p)
        for r in range(rows * chunk // n_chunks, last, _HEIGHT):
            n = min(_HEIGHT, last - r)
            for i in range(n):
                places[i] = pointer(crow, r + i)
            for some in range(0, examples, _TURNED):
                for i in range(0, n, ROWS):
                    for e in range(some, min(some + _TURNED, examples)):
                        place, to = (p + e) * rows + r + i, i * examples + e * ROWS
                        if i + ROWS <= n:
                            copy_rows(left, place, turned, to)
                        else:
                            for k in range(n - i):
                                put(turned, to + k, at(left, place + k))
            for c in range(0, cols, _ACROSS):
                wide = min(_ACROSS, cols - c)
                sums[:] = 0
                for f in range(0, examples, step):
                    terms = min(step, examples - f)
                    for e in range(terms):
                        for u in range(0, wide, 16):
                            j = (p + f + e) * cols + c + u
                            store(slabs, u * _TERMS + e * 16, _up_to_16(right, j, wide - u))
                    # Of the next columns' examples, how many are asked for, and how many a row and column.
                    done, share = 0, terms / (wide * n)
                    for u in range(0, wide, 16):
                        for i in range(0, n, ROWS):
                            multiply(
                                turned, i * examples + f * ROWS, 1, ROWS, slabs, u * _TERMS,
                                sums, i * _ACROSS + u, _ACROSS, terms,
                            )  # fmt: skip
                            due = min(terms, int(share * (u * n + 16 * i)) + 1)
                            for e in range(p + f + done, p + f + due):
                                for j in range(0, _ACROSS, 16):
                                    prefetch(right, e * cols + c + _ACROSS + j)
                            done = due
                            if f == 0 and u == 0:
                                ask(out, col, places, i, min(i + ROWS, n), 2 * _ACROSS)
                collect_rows(crow, col, r, n, c, wide, places, sums, _ACROSS, out, p > 0)
