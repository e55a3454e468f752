"""Rows of a sparse table, looked up by id at random, as dense rows.

A table is larger than any cache, so a lookup waits for memory: index and values of rows to come are asked for while
earlier ones are expanded, in two steps, because where a row's values lie is known only from its index. Without this the
expansion would be slower than copying dense rows (0.65 to 0.9 times), with it the bytes that are not read pay.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sparsecore.backends.numba import small
from sparsecore.backends.numba.jit import array, device_function, kernel, share_out, threads
from sparsecore.backends.numba.memory import output
from sparsecore.backends.numba.processor import INDEX_AHEAD, VALUES_AHEAD
from sparsecore.backends.numba.simd import (
    LANES,
    at,
    bits,
    count,
    expand,
    first_lanes,
    prefetch_far,
    put,
    store,
    store_masked,
    zeros,
)

__all__ = [
    "gather",
    "lines_of",
    "masks_of",
    "prefetch_lines",
    "prefetch_row",
    "row_of",
]

_LINE = 64  # bytes of a cache line
_STEP = 16  # elements from line to line: of float32, the fast path. The kernel would divide by an item size every time.
_MOST_LINES = 8  # asked for of a row: the processor notices by itself that a longer one is read on


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    if small.is_small_lookup(ids.numel() * n_cols, values.dtype):
        return small.gather(values, crow, col, ids, n_cols)
    out = output((ids.numel(), n_cols), values.dtype)
    n, lines = threads(out.numel()), row_of(values, crow, n_cols)
    if col is None:
        index = array(crow)
        _gather_bitmap(array(values), index, masks_of(index), array(ids), out.numpy(), lines, n)
    else:
        _gather_csr(array(values), array(crow), array(col), array(ids), out.numpy(), lines, n)
    return out


def masks_of(bitmap: np.ndarray) -> np.ndarray:
    """A bitmap as masks of 16 columns: those of row r begin at ``[r, 2]``."""
    return bitmap.view(np.uint16)


def lines_of(stored: Tensor, crow: Tensor, most: int = _MOST_LINES) -> int:
    """Cache lines to ask for of a row of average length, wherever in a line it begins."""
    size = stored.element_size()
    bytes_of_row = stored.numel() * size // max(1, crow.shape[0] - 1)
    return min(most, (bytes_of_row * 5 // 4 + 2 * _LINE - size) // _LINE)


def row_of(values: Tensor, crow: Tensor, n_cols: int) -> tuple[int, ...]:
    """A tuple as long as the number of cache lines to ask for of a row of average length.

    A row ends in a vector that may hold two values and still reaches over a whole line: without the lines that it
    touches, lookups took longer on Zen 5 and on Zen 4.
    """
    size, blocks = values.element_size(), max(1, -(-n_cols // LANES))
    row = values.numel() * size // max(1, crow.shape[0] - 1)
    reach = row * (blocks - 1) // blocks * 5 // 4 + LANES * size
    return (0,) * max(3, min(_MOST_LINES, (reach + 2 * _LINE - size) // _LINE))


@device_function
def prefetch_row(stored, place, lines):
    """Ask for as many lines as the tuple `row_of` has entries.

    The number belongs to the type, so that the kernel has no loop here: one took 1.1 to 1.3 times as long in all.
    """
    for line in range(len(lines)):
        prefetch_far(stored, place + line * _STEP)


@device_function
def prefetch_lines(stored, place, lines):
    """Ask for the first lines of a row: three at least, without a branch (which costs more than a line too many)."""
    prefetch_far(stored, place)
    prefetch_far(stored, place + _STEP)
    prefetch_far(stored, place + 2 * _STEP)
    for line in range(3, lines):
        prefetch_far(stored, place + line * _STEP)


@kernel
def _gather_bitmap(values, index, masks, ids, out, lines, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, d = out.shape
    width, half_words = index.shape[1], masks.shape[1]
    blocks, tail = d // LANES, first_lanes(d % LANES)
    first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
    for e in range(first, min(last, first + INDEX_AHEAD)):
        prefetch_far(index, at(ids, e) * width)
    for e in range(first, last):
        if e + INDEX_AHEAD < last:
            prefetch_far(index, at(ids, e + INDEX_AHEAD) * width)
        if e + VALUES_AHEAD < last:
            prefetch_row(values, at(index, at(ids, e + VALUES_AHEAD) * width), lines)
        r = at(ids, e)
        k, m, o = at(index, r * width), r * half_words + 2, e * d
        for b in range(blocks):
            mask = bits(masks, m + b)
            store(out, o + b * LANES, expand(values, k, mask))
            k += count(mask)
        if tail:
            store_masked(out, o + blocks * LANES, expand(values, k, bits(masks, m + blocks)), tail)


@kernel
def _gather_csr(values, crow, col, ids, out, lines, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, d = out.shape
    blocks, tail = d // LANES, first_lanes(d % LANES)
    first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
    zero = zeros(values)
    for e in range(first, min(last, first + INDEX_AHEAD)):
        prefetch_far(crow, at(ids, e))
    for e in range(first, last):
        if e + INDEX_AHEAD < last:
            prefetch_far(crow, at(ids, e + INDEX_AHEAD))
        if e + VALUES_AHEAD < last:
            place = at(crow, at(ids, e + VALUES_AHEAD))
            prefetch_row(values, place, lines)
            prefetch_far(col, place)
            prefetch_far(
                col, place + _LINE
            )  # of uint8; a division here would cost more than it finds for wider ones
        o = e * d
        for b in range(blocks):
            store(out, o + b * LANES, zero)
        if tail:
            store_masked(out, o + blocks * LANES, zero, tail)
        r = at(ids, e)
        for k in range(at(crow, r), at(crow, r + 1)):
            put(out, o + at(col, k), at(values, k))
