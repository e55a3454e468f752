"""Blocks of W spread out, zeros included, and numbers at its nonzeros collected.

A block is ``n`` rows from ``first`` on and ``wide`` columns from ``left`` on, a multiple of 16; its rows lie ``step``
numbers apart in an array. ``reached[i]`` is the first nonzero of row i in the block, and afterwards the one behind the
block.

A function does all rows of a block: numba counts references to the arrays at every call, which takes as long as ten
vectors.
"""

from __future__ import annotations

import numpy as np
from numba.extending import overload

from sparsecore.backends.numba.jit import device_function
from sparsecore.backends.numba.panels import pointer
from sparsecore.backends.numba.simd import (
    add,
    at,
    bits,
    compress,
    count,
    first_lanes,
    load,
    load_masked,
    prefetch,
    put,
    store,
    store_masked,
    unpack,
    zeros,
)

__all__ = ["ask", "collect_rows", "reach", "spread_rows"]

# Rows between asking for a row's part of a block and spreading it out. A part is a few hundred bytes: where it ends,
# the processor's own fetching ahead has hardly begun. (Of what was asked for while the block before was multiplied,
# much is there where there are many examples, and less where there are few.)
_AHEAD = 4


def reach(crow, col, left, reached):
    """``reached[i]``: the first nonzero of row i in column ``left``, a multiple of 16, or behind it; of all rows."""
    raise NotImplementedError


def spread_rows(values, crow, col, first, n, left, wide, reached, out, step):
    """The block to ``out``, in whole vectors: behind the last column are zeros."""
    raise NotImplementedError


def collect_rows(crow, col, first, n, left, wide, reached, source, step, out, more):
    """The numbers of ``source`` at the block's nonzeros to their places in ``out``, or added to what lies there."""
    raise NotImplementedError


@device_function
def ask(array, col, upcoming, first, last, wide):
    """Fetch ``wide`` numbers of ``array``, and columns, from nonzeros ``upcoming[first]`` .. ``upcoming[last - 1]`` on.

    A processor does not foresee which part of which row comes next, and can wait for a few cache lines only at a time:
    a few of the next block are asked for now and then while this one is multiplied.
    """
    for i in range(first, last):
        for k in range(upcoming[i], upcoming[i] + wide, 16):
            prefetch(array, k)
            if col is not None:
                prefetch(col, k)


@overload(reach)
def _reach(crow, col, left, reached):
    def bitmap(crow, col, left, reached):
        masks, step = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
        for i in range(crow.shape[0] - 1):
            k = pointer(crow, i)
            for word in range(i * step + 2, i * step + 2 + left // 16):
                k += count(bits(masks, word))
            reached[i] = k

    def csr(crow, col, left, reached):
        for i in range(crow.shape[0] - 1):
            k, end = np.intp(crow[i]), np.intp(crow[i + 1])
            while k < end:
                middle = (k + end) // 2
                if np.intp(at(col, middle)) < left:
                    k = middle + 1
                else:
                    end = middle
            reached[i] = k

    return bitmap if crow.ndim == 2 else csr


@overload(spread_rows)
def _spread_rows(values, crow, col, first, n, left, wide, reached, out, step):
    def bitmap(values, crow, col, first, n, left, wide, reached, out, step):
        masks, words = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
        vectors = (wide + 15) // 16
        for i in range(n):
            near = min(i + _AHEAD, n - 1)
            ask(values, col, reached, near, near + 1, wide)
            k, place, word = reached[i], i * step, (first + i) * words + 2 + left // 16
            for v in range(vectors):
                mask = bits(masks, word + v)
                store(out, place + v * 16, unpack(values, k, mask))
                k += count(mask)
            reached[i] = k

    def csr(values, crow, col, first, n, left, wide, reached, out, step):
        vectors = (wide + 15) // 16
        for i in range(n):
            near = min(i + _AHEAD, n - 1)
            ask(values, col, reached, near, near + 1, wide)
            for v in range(vectors):
                store(out, i * step + v * 16, zeros(out))
            k, end, place, beyond = reached[i], np.intp(crow[first + i + 1]), i * step - left, left + wide
            while k + 7 < end and np.intp(at(col, k + 7)) < beyond:
                for m in range(k, k + 8):
                    put(out, place + np.intp(at(col, m)), at(values, m))
                k += 8
            while k < end and np.intp(at(col, k)) < beyond:
                put(out, place + np.intp(at(col, k)), at(values, k))
                k += 1
            reached[i] = k

    return bitmap if crow.ndim == 2 else csr


@overload(collect_rows)
def _collect_rows(crow, col, first, n, left, wide, reached, source, step, out, more):
    def bitmap(crow, col, first, n, left, wide, reached, source, step, out, more):
        masks, words = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
        vectors = (wide + 15) // 16
        for i in range(n):
            k, place, word = reached[i], i * step, (first + i) * words + 2 + left // 16
            # A whole vector where the row has room for it: what is too much is overwritten by the columns to the right.
            end = pointer(crow, first + i + 1) - 16
            for v in range(vectors):
                mask = bits(masks, word + v)
                numbers, lanes = compress(load(source, place + v * 16), mask), first_lanes(count(mask))
                if more:
                    store_masked(out, k, add(numbers, load_masked(out, k, lanes)), lanes)
                elif k <= end:
                    store(out, k, numbers)
                else:
                    store_masked(out, k, numbers, lanes)
                k += count(mask)
            reached[i] = k

    def csr(crow, col, first, n, left, wide, reached, source, step, out, more):
        for i in range(n):
            k, end, place, beyond = reached[i], np.intp(crow[first + i + 1]), i * step - left, left + wide
            while k + 7 < end and np.intp(at(col, k + 7)) < beyond:
                for m in range(k, k + 8):
                    number = at(source, place + np.intp(at(col, m)))
                    put(out, m, at(out, m) + number if more else number)
                k += 8
            while k < end and np.intp(at(col, k)) < beyond:
                number = at(source, place + np.intp(at(col, k)))
                put(out, k, at(out, k) + number if more else number)
                k += 1
            reached[i] = k

    return bitmap if crow.ndim == 2 else csr
