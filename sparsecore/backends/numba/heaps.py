"""Heaps of the k best entries, a score and a row each, with the worst of them first: side by side in two arrays."""

from __future__ import annotations

import numpy as np

from sparsecore.backends.numba.jit import device_function
from sparsecore.backends.numba.simd import at, put

__all__ = ["begin_heaps", "empty_heap", "sink"]

_NO_ROW = np.iinfo(np.int64).max  # behind every other in the order of equal scores


@device_function
def begin_heaps(scores, rows, worst):
    for i in range(scores.shape[0]):
        put(scores, i, scores.dtype.type(-np.inf))
        put(rows, i, np.int64(_NO_ROW))
    for query in range(worst.shape[0]):
        put(worst, query, worst.dtype.type(-np.inf))


@device_function
def _better(score, row, other, other_row):
    return score > other or (score == other and row < other_row)


@device_function
def sink(scores, rows, base, size, score, row):
    """Put an entry in the place of a heap's first, and let it sink to where it belongs."""
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= size:
            break
        if child + 1 < size and _better(
            at(scores, base + child),
            at(rows, base + child),
            at(scores, base + child + 1),
            at(rows, base + child + 1),
        ):
            child += 1
        if not _better(score, row, at(scores, base + child), at(rows, base + child)):
            break
        put(scores, base + hole, at(scores, base + child))
        put(rows, base + hole, at(rows, base + child))
        hole = child
    put(scores, base + hole, score)
    put(rows, base + hole, row)


@device_function
def empty_heap(scores, rows, base, k, found_scores, found_rows):
    """The entries of a heap, best first."""
    for size in range(k - 1, -1, -1):  # the worst that is left goes to the end
        found_scores[size], found_rows[size] = at(scores, base), at(rows, base)
        sink(scores, rows, base, size, at(scores, base + size), at(rows, base + size))
