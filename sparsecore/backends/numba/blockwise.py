"""Dense products of blocks of W that are spread out in scratch, zeros included: for dense weights and large batches.

A block has at most 128 rows and columns, 64 KiB of float32, which a core's second-level cache holds. Its *slabs* are 16
wide, and one of them, (terms, 16), stays in the first-level cache while up to 516 examples are multiplied with it
(`multiply`). Results are summed in scratch too: threads own columns of them, and rows of the gradient, so that they do
not depend on the number of threads. An infinite number times a zero of a block is NaN, as in a dense product.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.multiply import ROWS, multiply
from sparsecore.backends.numba.panels import pointer
from sparsecore.backends.numba.simd import (
    first_lanes,
    load,
    load_masked,
    prefetch,
    store,
    store_masked,
    transpose,
)
from sparsecore.backends.numba.stored_rows import ask, collect_rows, reach, spread_rows

_TERMS = 128  # of a sum at a time
_GROUP = 128  # columns of a result at a time; a multiple of 16
_EXAMPLES = 86 * ROWS  # at a time: their results, _GROUP wide, take 258 KiB of float32
_ACROSS = 64  # columns of W whose gradient is summed at a time; a multiple of 16
_HEIGHT = 32 * ROWS  # ... and rows


def spmm(values, crow, col, x, y, n_chunks):
    part = _part(len(x))
    scratch = _scratch(n_chunks, part, _GROUP, torch.from_numpy(x).dtype)
    _spmm(values, crow, col, x, y, part, *scratch, n_chunks)


def spmm_t(values, crow, col, dy, dx, n_chunks):
    part = _part(len(dy))
    scratch = _scratch(n_chunks, part, dy.shape[1], torch.from_numpy(dy).dtype)
    _spmm_t(values, crow, col, dy, dx, part, *scratch, n_chunks)


def sddmm(crow, col, dy, x, out, n_chunks):
    dtype, part = torch.from_numpy(x).dtype, _part(len(x))
    turned = workspace("turned dY", n_chunks, _HEIGHT * part + 16, dtype)
    slabs = workspace("slabs", n_chunks, _TERMS * _ACROSS, dtype)
    sums = workspace("results", n_chunks, _HEIGHT * _ACROSS, dtype)
    places = workspace("places", n_chunks, _HEIGHT, torch.int64)
    _sddmm(crow, col, dy, x, out, part, turned, slabs, sums, places, n_chunks)


def _part(batch: int) -> int:
    """Examples at a time, a multiple of ROWS: parts of a batch that are about equal."""
    parts = -(-batch // _EXAMPLES)
    return -(-batch // (parts * ROWS)) * ROWS


def _scratch(n_chunks: int, part: int, rows: int, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """Room for a block, its slabs, results, the last examples, and the nonzeros that were reached in the rows of W."""
    return (
        workspace("block", n_chunks, _TERMS * _GROUP, dtype),
        workspace("slabs", n_chunks, _TERMS * _GROUP, dtype),
        workspace("results", n_chunks, part * _GROUP, dtype),
        workspace("rest", n_chunks, ROWS * _TERMS, dtype),
        workspace("places", n_chunks, rows, torch.int64),
    )


@kernel
def _spmm(values, crow, col, x, y, part, blocks, slabs_, results_, rests, places_, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch, cols = x.shape
    rows = y.shape[1]
    numbers = x.reshape(-1)
    block, slabs, results, rest, places = (
        blocks[chunk], slabs_[chunk], results_[chunk], rests[chunk], places_[chunk]
    )  # fmt: skip
    first, last = _share(rows, n_chunks, chunk)
    rest[:] = 0
    for p in range(0, batch, part):
        examples = min(part, batch - p)
        for r in range(first, last, _GROUP):
            n = min(_GROUP, last - r)
            results[:] = 0
            for i in range(n):
                places[i] = pointer(crow, r + i)
            for c in range(0, cols, _TERMS):
                terms = min(_TERMS, cols - c)
                spread_rows(values, crow, col, r, n, c, terms, places, block, _TERMS)
                for u in range(0, n, 16):
                    for j in range(0, terms, 16):
                        transpose(block, u * _TERMS + j, _TERMS, slabs, u * _TERMS + j * 16, 16)
                _multiply_all(
                    numbers, p * cols + c, cols, examples, terms, n, slabs, rest, results,
                    values, col, places, n, terms,
                )  # fmt: skip
            _write(results, examples, n, y, p, r)


@kernel
def _spmm_t(values, crow, col, dy, dx, part, blocks, slabs_, results_, rests, places_, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    batch, rows = dy.shape
    cols = dx.shape[1]
    numbers = dy.reshape(-1)
    block, slabs, results, rest, places = (
        blocks[chunk], slabs_[chunk], results_[chunk], rests[chunk], places_[chunk]
    )  # fmt: skip
    first, last = _share(cols, n_chunks, chunk)
    rest[:] = 0
    for p in range(0, batch, part):
        examples = min(part, batch - p)
        reach(crow, col, first, places)
        for c in range(first, last, _GROUP):
            n = min(_GROUP, last - c)
            results[:] = 0
            for r in range(0, rows, _TERMS):
                terms = min(_TERMS, rows - r)
                spread_rows(values, crow, col, r, terms, c, n, places[r : r + terms], block, _GROUP)
                for i in range(terms):
                    for u in range(0, n, 16):
                        store(slabs, u * _TERMS + i * 16, load(block, i * _GROUP + u))
                below = places[r + terms : r + terms + _TERMS]
                _multiply_all(
                    numbers, p * rows + r, rows, examples, terms, n, slabs, rest, results,
                    values, col, below, min(_TERMS, rows - r - terms), n,
                )  # fmt: skip
            _write(results, examples, n, dx, p, c)


@device_function
def _share(size, n_chunks, chunk):
    """First and last of a chunk's columns of a result: whole slabs."""
    slabs = (size + 15) // 16
    return min(size, slabs * chunk // n_chunks * 16), min(size, slabs * (chunk + 1) // n_chunks * 16)


@device_function
def _up_to_16(array, place, there):
    return load(array, place) if there >= 16 else load_masked(array, place, first_lanes(there))


@device_function
def _multiply_all(
    numbers, start, step, examples, terms, n, slabs, rest, results, values, col, upcoming, n_upcoming, wide
):  # fmt: skip
    """Add the examples' products with n columns of slabs. Example e's numbers begin at ``start + e * step``.

    Meanwhile, ``wide`` values from each of the first ``n_upcoming`` upcoming nonzeros on are fetched, all or most.
    """
    whole = examples // ROWS * ROWS
    for e in range(whole, examples):
        for k in range(terms):
            rest[(e - whole) * _TERMS + k] = numbers[start + e * step + k]
    done, share = 0, n_upcoming / (n * examples)  # of upcoming rows, for an example and a column
    for u in range(0, n, 16):
        for e in range(0, whole, ROWS):
            multiply(
                numbers, start + e * step, step, 1, slabs, u * _TERMS, results, e * _GROUP + u, _GROUP, terms
            )  # fmt: skip
            due = min(n_upcoming, int(share * (u * examples + 16 * e)) + 1)
            ask(values, col, upcoming, done, due, wide)
            done = due
        if whole < examples:
            multiply(rest, 0, _TERMS, 1, slabs, u * _TERMS, results, whole * _GROUP + u, _GROUP, terms)


@device_function
def _write(results, examples, n, out, p, first):
    """The results of n columns to columns ``first`` .. of examples p .."""
    flat, width = out.reshape(-1), out.shape[1]
    for e in range(examples):
        t = (p + e) * width + first
        for u in range(0, n // 16 * 16, 16):
            store(flat, t + u, load(results, e * _GROUP + u))
        if n % 16:
            u = n // 16 * 16
            store_masked(flat, t + u, load(results, e * _GROUP + u), first_lanes(n % 16))


@kernel
def _sddmm(crow, col, dy, x, out, part, turned_, slabs_, sums_, places_, n_chunks, chunk):
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
            for i in range(0, n, ROWS):
                for e in range(examples):
                    # What a vector has too much is overwritten by the next one.
                    place = (p + e) * rows + r + i
                    store(turned, i * examples + e * ROWS, _up_to_16(left, place, left.shape[0] - place))
            for c in range(0, cols, _ACROSS):
                wide = min(_ACROSS, cols - c)
                sums[:] = 0
                for f in range(0, examples, _TERMS):
                    terms = min(_TERMS, examples - f)
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
