"""Exploration on index sets: what survives pruning, where the gradient is largest, and random free positions.

Each step takes an index set and returns another one in the same encoding. Nothing is as large as the weight: beside the
block of gradient there are a place and a score for each candidate, and at most about 3/2 k candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.fill import fill
from sparsecore.backends.numba.index_set import IndexSet, insert, surviving
from sparsecore.backends.numba.jit import array, kernel, share_out, threads
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.overlay import overlay_
from sparsecore.backends.numba.rewrite import realign_, record_
from sparsecore.backends.numba.selection import k_largest, k_smallest
from sparsecore.backends.numba.simd import (
    absolute,
    at_least,
    bits,
    compress,
    consecutive,
    count,
    first_lanes,
    fma,
    greater,
    horizontal_sum,
    load,
    load_masked,
    splat,
    store,
    store_masked,
    zeros,
)
from sparsecore.ops.explore import GradientSource, Index
from sparsecore.topology.blocks import BLOCK, block_height

__all__ = ["fill", "grow", "overlay_", "prune", "realign_", "record_"]

_SAMPLED_ROWS = 2048


def prune(values: Tensor, index: Index, shape: tuple[int, int], k: int) -> Index:
    """Index without the k weights of smallest magnitude."""
    numbers = array(values)
    return surviving(numbers, IndexSet(index, shape), *k_smallest(numbers, k)).index


def grow(
    source: GradientSource, tensors: Index, shape: tuple[int, int], k: int, skip_row: int | None
) -> Index:
    """Index with the k positions of largest |gradient| outside it added."""
    index, rows = IndexSet(tensors, shape), source.rows()
    n_rows = shape[0] if rows is None else rows.numel()
    if n_rows == 0:
        return tensors
    threshold = _guess(source, rows, n_rows, index, k, skip_row) if k else np.inf
    found = _best(source, rows, n_rows, index, k, skip_row, threshold)
    if found.size < k and threshold > 0:  # the sample misled
        found = _best(source, rows, n_rows, index, k, skip_row, 0.0)
    found.scores = found.scores[:0].copy()  # frees them
    ids = np.empty(0, np.int64) if rows is None else array(rows)
    return insert(index, found.places, found.starts, found.counts, ids, found.height).index


@dataclass
class Candidates:
    """Scored positions, those of a block of rows together, ascending.

    Attributes:
        places: int32, counted from the block's first row.
        scores: of the gradient's type.
        starts, counts: where each block's are.
        height: rows of a block.
    """

    places: np.ndarray
    scores: np.ndarray
    starts: list[int]
    counts: list[int]
    height: int

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def end(self) -> int:
        return self.starts[-1] + self.counts[-1] if self.starts else 0

    def reduce(self, k: int) -> float:
        """Keep the k best; returns the worst score among them. No gaps between blocks, before and after."""
        threshold, last = k_largest(self.scores[: self.end], k)
        starts, counts = np.array(self.starts), np.array(self.counts)
        kind = self.scores.dtype.type
        _keep(self.places, self.scores, kind(threshold), last, starts, counts, threads(self.end))
        self.counts = counts.tolist()
        self.join()
        return threshold

    def join(self) -> None:
        """Close the gaps between blocks."""
        end = 0
        for block, (start, n) in enumerate(zip(self.starts, self.counts, strict=True)):
            if start > end:
                for part in (self.places, self.scores):
                    part[end : end + n] = part[start : start + n]
            self.starts[block] = end
            end += n


def _best(
    source: GradientSource,
    rows: Tensor | None,
    n_rows: int,
    index: IndexSet,
    k: int,
    skip_row: int | None,
    threshold: float,
) -> Candidates:
    """The k largest |gradient| above a threshold, in one stream over the blocks."""
    height, cols = block_height(index.shape, torch.device("cpu")), index.shape[1]
    found = Candidates(np.empty(0, np.int32), np.empty(0), [], [], height)
    limit = min(k + k // 2, n_rows * cols)
    for gradient, ids in _blocks(source, rows, n_rows, height):
        n_chunks = threads(gradient.size)
        if not found.starts:
            room = limit + min(height, n_rows) * cols + 16 * (torch.get_num_threads() + 1)
            found.places = torch.empty(room, dtype=torch.int32, device="cpu").numpy()
            found.scores = torch.empty(room, dtype=torch.from_numpy(gradient[:0]).dtype, device="cpu").numpy()
        _append(found, gradient, ids, index, skip_row, threshold, n_chunks)
        if found.end > limit:
            threshold = float(found.reduce(k)) if k else threshold
    if found.size > k:
        found.reduce(k)
    return found


def _blocks(
    source: GradientSource, rows: Tensor | None, n_rows: int, height: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gradient (n, cols) and ids (n,) of the rows, block by block."""
    for first in range(0, n_rows, height):
        last = min(first + height, n_rows)
        if rows is None:
            yield _gradient(source, slice(first, last)), np.arange(first, last)
        else:
            yield _gradient(source, rows[first:last]), array(rows[first:last])


def _gradient(source: GradientSource, rows: Tensor | slice) -> np.ndarray:
    gradient = source.block(rows)
    return array(gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.float())


def _append(
    found: Candidates,
    gradient: np.ndarray,
    ids: np.ndarray,
    index: IndexSet,
    skip_row: int | None,
    threshold: float,
    n_chunks: int,
) -> None:
    """Candidates of one block, behind those of the others."""
    end, (n, cols) = found.end, gradient.shape
    skip = -1 if skip_row is None else skip_row
    counts, finite = np.zeros((2, n_chunks), np.int64)
    lines = workspace("candidates", n_chunks, cols // 16 + 1, torch.int16).view(np.uint16)
    _candidates(
        gradient, ids, *index.arrays(), skip, gradient.dtype.type(threshold), found.places.view(np.float32),
        found.scores, end, counts, finite, lines, n_chunks,
    )  # fmt: skip
    if not finite.all():
        raise FloatingPointError
    total = 0
    for chunk, m in enumerate(counts.tolist()):
        start = end + n * chunk // n_chunks * cols + 16 * chunk
        if chunk:
            for part in (found.places, found.scores):
                part[end + total : end + total + m] = part[start : start + m]
        total += m
    found.starts.append(end)
    found.counts.append(total)


def _guess(
    source: GradientSource, rows: Tensor | None, n_rows: int, index: IndexSet, k: int, skip_row: int | None
) -> float:
    """A threshold that a little more than k candidates pass: from a sample of rows; 0 where that is not worth it.

    Without it the first blocks would all be candidates. Rows may differ much from each other, so the margin comes from
    the spread between the sampled rows.
    """
    cols = index.shape[1]
    n = min(_SAMPLED_ROWS, n_rows // 32)
    if n_rows * cols < BLOCK or n < 16:
        return 0.0
    picked = ((np.arange(n) + np.arange(n) * 0.6180339887 % 1) * (n_rows / n)).astype(np.int64)
    ids = torch.from_numpy(picked)
    ids = ids if rows is None else rows[ids]
    sample = Candidates(np.empty(0, np.int32), np.empty(0), [], [], n)
    gradient = _gradient(source, ids)
    n_chunks = threads(gradient.size)
    sample.places = np.empty(n * cols + 16 * (n_chunks + 1), np.int32)
    sample.scores = np.empty(sample.places.shape, gradient.dtype)
    _append(sample, gradient, array(ids), index, skip_row, 0.0, n_chunks)
    scores, row = sample.scores[: sample.size], sample.places[: sample.size] // cols
    wanted = 1.02 * k * n / n_rows
    for _ in range(2):
        rank = sample.size - int(wanted) - 2
        if rank < 0:
            return 0.0
        threshold = np.partition(scores, rank)[rank]
        spread = np.bincount(row[scores > threshold], minlength=n).std() * n**0.5
        wanted = 1.02 * k * n / n_rows + 4 * spread
    return float(threshold)


@kernel
def _candidates(
    gradient,
    ids,
    pointers,
    col,
    masks,
    stride,
    skip,
    threshold,
    places,
    scores,
    begin,
    counts,
    finite,
    lines,
    n_chunks,
    chunk,
):
    """Places and scores of |gradient| > threshold outside the index; a chunk's begin where its rows' would, at most."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n, cols = gradient.shape
    first, last = n * chunk // n_chunks, n * (chunk + 1) // n_chunks
    start = begin + first * cols + 16 * chunk
    end, zero, least, check = start, zeros(gradient), splat(threshold), zeros(gradient)
    line = lines[chunk]
    for j in range(cols // 16 + 1):
        line[j] = 0
    for i in range(first, last):
        r = ids[i]
        free = np.uint16(0) if r == skip else np.uint16(0xFFFF)
        if col is not None:
            for k in range(pointers[r], pointers[r + 1]):
                c = np.int64(col[k])
                line[c >> 4] |= np.uint16(1 << (c & 15))
        for j in range(0, cols, 16):
            if j + 16 <= cols:
                a = absolute(load(gradient, i * cols + j))
            else:
                a = absolute(load_masked(gradient, i * cols + j, first_lanes(cols - j)))
            check = fma(a, zero, check)  # infinity times 0 is NaN
            if col is not None:
                stored = line[j >> 4]
            if masks is not None:
                stored = bits(masks, r * stride + 2 + (j >> 4))
            mask = np.uint16(greater(a, least) & ~stored & free)
            store(scores, end, compress(a, mask))
            store(places, end, compress(consecutive(i * cols + j), mask))
            end += count(mask)
        if col is not None:
            for k in range(pointers[r], pointers[r + 1]):
                line[np.int64(col[k]) >> 4] = 0
    counts[chunk] = end - start
    finite[chunk] = horizontal_sum(check) == 0


@kernel
def _keep(places, scores, threshold, last, starts, counts, n_chunks, chunk):
    """Move the candidates above the threshold, or equal to it up to place ``last``, to the front of their block."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = starts.shape[0]
    numbers = places.view(np.float32)
    least = splat(threshold)
    for block in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
        end = starts[block]
        stop = end + counts[block]
        for k in range(end, stop, 16):
            lanes = first_lanes(min(16, stop - k))
            a = load_masked(scores, k, lanes)
            mask = np.uint16(greater(a, least) & lanes)
            if k <= last:
                mask = np.uint16(mask | (at_least(a, least) & lanes & first_lanes(min(16, last + 1 - k))))
            place = compress(load_masked(numbers, k, lanes), mask)
            m = count(mask)
            store_masked(scores, end, compress(a, mask), first_lanes(m))
            store_masked(numbers, end, place, first_lanes(m))
            end += m
        counts[block] = end - starts[block]
