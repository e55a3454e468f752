"""Exact selection by magnitude: a bracket around the threshold from a sample, one pass, a partition of its inside.

The bracket holds about 2 % of the numbers, so one pass at memory speed replaces a partition of a copy of all. Where it
misses, or holds far more than expected (ties), histograms over the bits, 11 at a time, give the same answer.
"""

from __future__ import annotations

import numpy as np

from sparsecore.backends.numba.jit import kernel, share_out, threads
from sparsecore.backends.numba.simd import (
    absolute,
    at_least,
    compress,
    count,
    first_lanes,
    fma,
    greater,
    horizontal_sum,
    load,
    load_masked,
    splat,
    store,
    zeros,
)

__all__ = ["k_largest", "k_smallest"]

_SMALL = 1 << 15  # up to here a partition is as fast
_SAMPLE = 1 << 15
_TIES = 1 << 16  # among which ties are searched at a time
_DIGITS = 1 << 20  # whose digits are looked at at a time


def k_smallest(numbers: np.ndarray, k: int) -> tuple[float, int]:
    """``(threshold, last)``: exactly k have ``|x| < threshold``, or ``==`` and a place up to ``last``.

    Raises:
        FloatingPointError: if one of them is NaN or infinite.
    """
    n = numbers.shape[0]
    threshold, below, equal = _order_statistic(numbers, max(k - 1, 0))
    if k in (0, n):
        return (-1.0, n) if k == 0 else (np.inf, n)
    return threshold, _last_tie(numbers, threshold, k - below, equal)


def k_largest(numbers: np.ndarray, k: int) -> tuple[float, int]:
    """The same for ``|x| > threshold``, or ``==`` up to place ``last``; k is in ``1 .. n``."""
    n = numbers.shape[0]
    threshold, below, equal = _order_statistic(numbers, n - k)
    return threshold, _last_tie(numbers, threshold, k - (n - below - equal), equal)


def _last_tie(numbers: np.ndarray, threshold: float, wanted: int, equal: int) -> int:
    """Place of the ``wanted``-th number of this magnitude; the length, if all of them are wanted."""
    n, kind = numbers.shape[0], numbers.dtype.type
    if wanted == equal:
        return n
    nothing, counts = np.empty(16, numbers.dtype), np.empty((4, 1), np.int64)
    for first in range(0, n, _TIES):
        part = numbers[first : first + _TIES]
        _collect(part, kind(threshold), kind(threshold), nothing, counts, 1)
        if counts[1, 0] >= wanted:
            return first + int(np.flatnonzero(np.abs(part) == threshold)[wanted - 1])
        wanted -= int(counts[1, 0])
    raise AssertionError("fewer ties than were counted")


def _order_statistic(numbers: np.ndarray, rank: int) -> tuple[float, int, int]:
    """The magnitude with ``rank`` others before it in order; how many are smaller, and how many equal it."""
    n = numbers.shape[0]
    if n <= _SMALL:
        magnitudes = np.abs(numbers)
        if not np.isfinite(magnitudes.max()):
            raise FloatingPointError
        threshold = np.partition(magnitudes, rank)[rank]
        below, equal = magnitudes < threshold, magnitudes == threshold
        return float(threshold), int(below.sum()), int(equal.sum())
    low, high = _bracket(numbers, rank)
    n_chunks = threads(n)
    capacity = n // (8 * n_chunks) + 16
    found = np.empty(n_chunks * capacity, numbers.dtype)
    counts = np.empty((4, n_chunks), np.int64)
    _collect(numbers, low, high, found, counts, n_chunks)
    if counts.min() < 0:
        raise FloatingPointError
    # Ties at the ends of the bracket are only counted: many equal numbers are at an end more often than not.
    smaller, at_low, inside, at_high = counts.sum(axis=1).tolist()
    place = rank - smaller
    if 0 <= place < at_low:
        return float(low), smaller, at_low
    place -= at_low
    if 0 <= place < inside and counts[2].max() <= capacity - 16:
        near = np.concatenate([found[i * capacity : i * capacity + m] for i, m in enumerate(counts[2])])
        near.partition(place)
        threshold = near[place]
        return (
            float(threshold),
            smaller + at_low + int((near < threshold).sum()),
            int((near == threshold).sum()),
        )
    if inside <= place < inside + at_high:
        return float(high), smaller + at_low + inside, at_high
    return _by_digits(numbers, rank)


def _bracket(numbers: np.ndarray, rank: int) -> tuple[float, float]:
    """Magnitudes between which the one of this rank lies, by five standard deviations of a sample's ranks."""
    n = numbers.shape[0]
    # Multiples of the golden ratio spread evenly whatever period the numbers have.
    places = (
        (np.arange(_SAMPLE, dtype=np.uint64) * np.uint64(11400714819323198485) >> np.uint64(11))
        * 2.0**-53
        * n
    )
    sample = np.abs(numbers[places.astype(np.int64)])
    sample.sort()
    share = rank / n
    center, spread = share * _SAMPLE, 5 * (share * (1 - share) * _SAMPLE) ** 0.5 + 3
    low, high = int(center - spread), int(center + spread)
    kind = numbers.dtype.type
    return (sample[low] if low >= 0 else kind(0)), (sample[high] if high < _SAMPLE else kind(np.inf))


def _by_digits(numbers: np.ndarray, rank: int) -> tuple[float, int, int]:
    """The same by histograms of 11 bits of the magnitudes at a time: exact for any distribution, O(1) memory."""
    width = 8 * numbers.itemsize - 1
    kind = np.uint32 if width == 31 else np.uint64
    prefix, smaller, equal = 0, 0, 0
    wanted = rank
    while width:
        digit = min(11, width)
        histogram = np.zeros(1 << digit, np.int64)
        for first in range(0, numbers.shape[0], _DIGITS):
            key = np.abs(numbers[first : first + _DIGITS]).view(kind)
            key = key[key >> kind(width) == prefix]
            part = (key >> kind(width - digit)) & kind((1 << digit) - 1)
            histogram += np.bincount(part.astype(np.int64), minlength=1 << digit)
        ends = histogram.cumsum()
        here = int(np.searchsorted(ends, wanted, side="right"))
        before = int(ends[here] - histogram[here])
        smaller, wanted, equal = smaller + before, wanted - before, int(histogram[here])
        prefix, width = prefix << digit | here, width - digit
    return np.array([prefix], kind).view(numbers.dtype)[0], smaller, equal


@kernel
def _collect(numbers, low, high, found, counts, n_chunks, chunk):
    """Magnitudes below, at the low end, strictly inside (collected too) and at the high end; -1: not all are finite."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, capacity = numbers.shape[0], found.shape[0] // n_chunks
    first, last = n * chunk // n_chunks // 16 * 16, n * (chunk + 1) // n_chunks // 16 * 16
    if chunk == n_chunks - 1:
        last = n
    floor, ceiling, zero = splat(low), splat(high), zeros(numbers)
    above, over, members, upto, check = 0, 0, 0, 0, zeros(numbers)
    start, limit = chunk * capacity, capacity - 16
    for k in range(first, last, 16):
        whole = k + 16 <= last  # else the lanes that are missing count as 0
        a = absolute(load(numbers, k) if whole else load_masked(numbers, k, first_lanes(last - k)))
        check = fma(a, zero, check)  # infinity times 0 is NaN
        above += count(at_least(a, floor))
        beyond = greater(a, floor)
        over += count(beyond)
        upto += count(np.uint16(beyond & at_least(ceiling, a)))
        mask = np.uint16(beyond & greater(ceiling, a))
        store(found, start + min(members, limit), compress(a, mask))
        members += count(mask)
    if low <= 0:
        above = last - first  # without the missing lanes
    counts[0, chunk] = last - first - above if horizontal_sum(check) == 0 else -1
    counts[1, chunk] = above - over
    counts[2, chunk] = members
    counts[3, chunk] = upto - members
