"""Entries of a lookup, grouped by the row that they look up: a stable radix sort."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sparsecore.backends.numba.jit import array, device_function, serial_kernel
from sparsecore.backends.numba.simd import at, prefetch_far
from sparsecore.backends.numba.spans import Spans

__all__ = ["Groups", "digits_of", "group", "grouped_in", "sort_keys"]

_NO_INDEX = np.empty(0, np.int32)
_DIGIT = 11  # bits that one pass of the radix sort looks at: 2048 counters stay in the L1 cache

Groups = tuple[np.ndarray, np.ndarray, np.ndarray]


def digits_of(n_rows: int) -> tuple[int, int]:
    """Passes that sort the ids of this many rows, and the bits that each looks at."""
    bits = max(1, (n_rows - 1).bit_length())
    passes = -(-bits // _DIGIT)
    return passes, -(-bits // passes)


def group(ids: Tensor, n_rows: int) -> Groups:
    """Distinct ids, ascending; where each one's entries begin (one more than ids); the entries in that order."""
    return _grouped(ids, n_rows, _NO_INDEX, 0)[0]


def grouped_in(crow: Tensor, ids: Tensor) -> tuple[Groups, Spans]:
    """Groups, and their rows as spans of the values."""
    index = array(crow)
    stride = index.shape[1] if index.ndim == 2 else 1
    return _grouped(ids, crow.shape[0] - 1, index if stride == 1 else index.reshape(-1), stride)


def _grouped(ids: Tensor, n_rows: int, index: np.ndarray, stride: int) -> tuple[Groups, Spans]:
    """Groups, and (with an index) their rows as spans of the values."""
    n = ids.numel()
    rows, starts, order = np.empty(n, np.int64), np.empty(n + 1, np.int32), np.empty(n, np.int32)
    begins, offsets = np.empty(n if stride else 0, np.int64), np.empty(n + 1 if stride else 0, np.int64)
    options = (n.bit_length(), *digits_of(n_rows), stride)
    found = _group(array(ids), index, *options, rows, starts, order, begins, offsets)
    return (rows[:found], starts[: found + 1], order), Spans(begins[:found], offsets[: found + 1])


@device_function
def sort_keys(keys, spare, counts, n, shift, passes, digits):
    """The first n keys by their bits from ``shift`` on, otherwise in their order; and the other array, free again. What
    is given beside keys is scratch, of at least as many numbers, and of ``2**digits``.
    """
    low = (1 << digits) - 1
    for p in range(passes):
        down = shift + p * digits
        for c in range(low + 1):
            counts[c] = 0
        for e in range(n):
            counts[(keys[e] >> down) & low] += 1
        total = 0
        for c in range(low + 1):
            counts[c], total = total, total + counts[c]
        for e in range(n):
            c = (keys[e] >> down) & low
            spare[counts[c]] = keys[e]
            counts[c] += 1
        keys, spare = spare, keys
    return keys, spare


@serial_kernel
def _group(ids, index, shift, passes, digits, stride, rows, starts, order, begins, offsets):
    n = ids.shape[0]
    keys, spare = np.empty(n, np.int64), np.empty(n, np.int64)
    for e in range(n):
        keys[e] = (ids[e] << shift) | e
        if stride:  # the index arrives while the keys are sorted
            prefetch_far(index, ids[e] * stride)
    keys, spare = sort_keys(keys, spare, np.empty(1 << digits, np.int64), n, shift, passes, digits)
    found, before = 0, np.int64(-1)
    for e in range(n):
        key = keys[e]
        order[e] = key & ((1 << shift) - 1)
        if key >> shift != before:
            before = key >> shift
            rows[found], starts[found] = before, e
            found += 1
    starts[found] = n
    if stride:
        total = 0
        for u in range(found):
            offsets[u] = total
            r = at(rows, u) * stride
            begins[u] = np.int64(at(index, r))
            total += np.int64(at(index, r + stride)) - begins[u]
        offsets[found] = total
    return found
