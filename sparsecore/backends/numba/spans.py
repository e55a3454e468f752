"""Which elements of a weight a gradient belongs to, as *spans*: elements that follow one another in both.

A row of a table is a span, in a sparse gradient as in memory. A kernel that knows where each begins and ends takes it
16 elements at a time and asks memory for spans to come. Place after place, where the next vector begins is known only
from the last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.jit import array, serial_kernel
from sparsecore.backends.numba.processor import ZEN_5
from sparsecore.backends.numba.simd import (
    LANES,
    at,
    breaks,
    compress,
    consecutive,
    count,
    put,
    store,
)

__all__ = ["LINE", "MOST_LINES", "SPANS_AHEAD", "Spans", "spans_of_places", "spans_of_rows", "whole"]

SPANS_AHEAD = 16 if ZEN_5 else 8  # spans between asking for one and changing it
_LONGEST = 1024  # elements (or one more), so that a gradient of one run can be divided among threads
LINE = 64  # bytes of a cache line
MOST_LINES = 8  # asked for of a span: the processor notices by itself that a longer one is read on


class Spans(NamedTuple):
    """Disjoint runs of elements, ascending.

    Attributes:
        begins: (n,) int64: where each begins in the weight.
        offsets: (n + 1,) int64: where each begins in the gradient.
    """

    begins: np.ndarray
    offsets: np.ndarray


def spans_of_places(places: Tensor, grad: Tensor, size: int) -> tuple[Spans, Tensor]:
    """Spans of the elements at these places, and the gradient there: entries of the same place are summed, in order.

    The gradients of several lookups come one after another, each ascending: they are merged, not sorted.

    Raises:
        IndexError: for a place outside 0 .. size - 1, which kernels would write to.
    """
    keys = places.contiguous().numpy()
    begins, offsets, pieces = _find(keys)
    if pieces > 1:
        keys, numbers = _merge(keys, array(grad), pieces)
        grad = torch.from_numpy(numbers)
        begins, offsets, _ = _find(keys)
    if keys.size and not (keys[0] >= 0 and keys[-1] < size):
        raise IndexError(f"a sparse gradient of {size} elements has entries at {keys[0]} .. {keys[-1]}")
    return Spans(begins, offsets), grad


def spans_of_rows(rows: Tensor, width: int) -> Spans:
    """Spans of whole rows (ascending, each once) of a dense table."""
    return Spans(rows.numpy() * width, np.arange(0, (rows.numel() + 1) * width, width)[: rows.numel() + 1])


@lru_cache(maxsize=64)
def whole(n: int) -> Spans:
    """Spans of all n elements."""
    begins = np.arange(0, n, _LONGEST)
    return Spans(begins, np.append(begins, n))


@serial_kernel
def _find(places):
    """Begins and offsets of the spans, and the number of ascending pieces."""
    n, found, pieces = places.shape[0], 0, 0
    scratch = np.empty(n + LANES, np.int32)
    numbers = scratch.view(np.float32)
    if n > 0:
        scratch[0] = 0
        found = 1
    for i in range(1, n, LANES):
        lanes = min(LANES, n - i)
        mask = breaks(places, i, lanes)
        if i > _LONGEST and i % _LONGEST == 1:
            mask = np.uint16(mask | 1)
        store(numbers, found, compress(consecutive(i), mask))
        found += count(mask)
    begins, offsets = np.empty(found, np.int64), np.empty(found + 1, np.int64)
    for u in range(found):
        offset = np.int64(at(scratch, u))
        put(offsets, u, offset)
        put(begins, u, at(places, offset))
        pieces += u == 0 or at(places, offset) <= at(places, offset - 1)
    offsets[found] = n
    return begins, offsets, pieces


@serial_kernel
def _merge(places, grad, pieces):
    n = places.shape[0]
    bounds = np.empty(pieces + 1, np.int64)
    a, b, x, y = places.copy(), np.empty(n, np.int64), grad.copy(), np.empty(n, grad.dtype)
    found = 0
    for i in range(n):
        if i == 0 or a[i] <= a[i - 1]:
            bounds[found] = i
            found += 1
    bounds[found] = n
    while found > 1:
        w, merged = 0, 0
        for piece in range(0, found, 2):
            i, middle = bounds[piece], bounds[piece + 1]
            j, end = middle, bounds[min(piece + 2, found)]
            bounds[merged] = w
            merged += 1
            while i < middle and j < end:
                left, right = a[i], a[j]
                number = grad.dtype.type(0)
                if left <= right:
                    number = x[i]
                if left >= right:
                    number += x[j]
                b[w], y[w] = min(left, right), number
                i += left <= right
                j += left >= right
                w += 1
            while i < middle:
                b[w], y[w] = a[i], x[i]
                w += 1
                i += 1
            while j < end:
                b[w], y[w] = a[j], x[j]
                w += 1
                j += 1
        bounds[merged] = w
        found, n = merged, w
        a, b, x, y = b, a, y, x
    return a[:n], x[:n]
