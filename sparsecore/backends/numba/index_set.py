"""Index sets in both encodings: take away, insert."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sparsecore.backends.numba.jit import array, kernel, share_out, split, threads
from sparsecore.backends.numba.simd import (
    absolute,
    at,
    at_least,
    bits,
    count,
    greater,
    prefetch,
    put,
    splat,
    unpack,
)
from sparsecore.ops.explore import Index

__all__ = ["IndexSet", "chunk_edges", "insert", "surviving"]

# Elements that are asked for ahead. The processor's own prefetching ends with every page of 4 KiB: reading 128 MB of
# values as long as the masks say takes 22 ms without, 6 ms with it.
_AHEAD = 2048


class IndexSet:
    """An index set as kernels read it: row pointers, and either columns or masks of 16 columns.

    The kernels branch on which of the two is None, when they are compiled.
    """

    def __init__(self, index: Index, shape: tuple[int, int]) -> None:
        crow, col = index
        self.index, self.shape, self.rows = index, shape, shape[0]
        self.columns: np.ndarray | None = None
        self.masks: np.ndarray | None = None
        self.pointers, self.stride = array(crow), 0
        if col is None:
            bitmap = self.pointers
            self.pointers, self.masks = bitmap[:, 0], bitmap.view(np.uint16).reshape(-1)
            self.stride = 2 * bitmap.shape[1]
        else:
            self.columns = array(col)

    def arrays(self) -> tuple:
        """Arguments of a kernel: pointers, columns, masks, masks of a row."""
        return self.pointers, self.columns, self.masks, self.stride

    @property
    def nnz(self) -> int:
        return int(self.pointers[-1])

    @property
    def work(self) -> int:
        """What a pass over it costs."""
        return self.nnz if self.masks is None else self.masks.shape[0]

    def number_rows(self, edges: np.ndarray) -> None:
        """Add up pointers that were counted from 0 in each range of rows."""
        for first, last in pairwise(edges[1:]):
            self.pointers[first + 1 : last + 1] += self.pointers[first]


def chunk_edges(index: IndexSet, n_chunks: int) -> np.ndarray:
    """Ranges of rows of about the same work."""
    if index.masks is not None:
        return index.rows * np.arange(n_chunks + 1) // n_chunks
    edges = np.searchsorted(index.pointers, index.nnz * np.arange(n_chunks + 1) // n_chunks)
    edges[0], edges[-1] = 0, index.rows
    return edges


def surviving(values: np.ndarray, index: IndexSet, threshold: float, last: int) -> IndexSet:
    """Without the weights of ``|w| < threshold``, or ``==`` up to place ``last``."""
    n_chunks = threads(index.work)
    edges = chunk_edges(index, n_chunks)
    old_crow, old_col = index.index
    crow, col = torch.zeros_like(old_crow), None if old_col is None else torch.empty_like(old_col)
    out = IndexSet((crow, col), index.shape)
    target: Any = out.columns if out.masks is None else out.masks
    blocks, threshold = -(-index.shape[1] // 16), values.dtype.type(threshold)
    _surviving(
        values, *index.arrays(), blocks, threshold, last, edges, out.pointers, target, n_chunks,
    )  # fmt: skip
    if col is not None:  # close the gaps between the chunks' columns
        end = int(out.pointers[edges[1]])
        for first, until in pairwise(edges[1:]):
            start, n = int(index.pointers[first]), int(out.pointers[until])
            n = n if until > first else 0
            target[end : end + n] = target[start : start + n]
            end += n
    out.number_rows(edges)
    return out if col is None else IndexSet((crow, col[: out.nnz]), index.shape)


def insert(
    index: IndexSet, places: np.ndarray, starts: list[int], counts: list[int], ids: np.ndarray, height: int
) -> IndexSet:
    """With these positions added, which it does not have: of each block, ascending, counted from its first row.

    Args:
        index: is overwritten (bitmap), or merged into another one.
        places: int32, of all blocks; those of one are ``places[start : start + count]``.
        starts, counts: of each block.
        ids: the rows in the order of the blocks; empty: all rows.
        height: rows of a block.
    """
    total = sum(counts)
    if total == 0:
        return index
    first, length, n_chunks = np.array(starts), np.array(counts), threads(total)
    added = np.zeros(index.rows + 1, index.pointers.dtype) if index.masks is None else None
    _mark(places, first, length, ids, height, index.shape[1], added, index.masks, index.stride, n_chunks)
    return renumbered(index) if added is None else _union(index, added, places)


def renumbered(index: IndexSet) -> IndexSet:
    """A bitmap with the pointers that belong to its bits."""
    n_chunks = threads(index.work)
    edges = chunk_edges(index, n_chunks)
    _count_rows(index.masks, index.stride, -(-index.shape[1] // 16), edges, index.pointers, n_chunks)
    index.number_rows(edges)
    return index


def _union(index: IndexSet, counts: np.ndarray, added: np.ndarray) -> IndexSet:
    """With ``counts[r + 1]`` more columns in row r; they follow each other in ``added``."""
    np.cumsum(counts, out=counts)
    crow = torch.from_numpy(index.pointers + counts)
    assert index.index[1] is not None
    col = index.index[1].new_empty(int(crow[-1]))
    out = IndexSet((crow, col), index.shape)
    _merge(index.pointers, index.columns, counts, added, out.pointers, out.columns, threads(out.nnz))
    return out


@kernel
def _surviving(
    values, pointers, col, masks, stride, blocks, threshold, last, edges, out_pointers, out, n_chunks, chunk
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    begin = pointers[edges[chunk]]
    end = begin
    least = splat(threshold)
    for r in range(edges[chunk], edges[chunk + 1]):
        if col is not None:
            for k in range(pointers[r], pointers[r + 1]):
                out[end] = col[k]
                a = abs(values[k])
                end += (a > threshold) | ((a == threshold) & (k > last))
        if masks is not None:
            k = pointers[r]
            for b in range(r * stride + 2, r * stride + 2 + blocks):
                m = bits(masks, b)
                n = count(m)
                prefetch(values, k + _AHEAD)
                a = absolute(unpack(values, k, m))
                if k > last:
                    keep = np.uint16(at_least(a, least) & m)
                else:
                    keep = np.uint16(greater(a, least) & m)
                    if last < k + n - 1:
                        rest = m  # ties behind the last that goes
                        for _ in range(last + 1 - k):
                            rest = np.uint16(rest & (rest - 1))
                        keep = np.uint16(keep | (at_least(a, least) & rest))
                put(out, b, keep)
                k += n
                end += count(keep)
        out_pointers[r + 1] = end - begin


@kernel
def _mark(places, starts, counts, ids, height, cols, added, masks, stride, n_chunks, chunk):
    """Set the bits of these places; or count them by row, and replace them by their columns."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = starts.shape[0]
    for block in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
        i, begin = block * height, 0
        r = ids[i] if ids.shape[0] else i
        for k in range(starts[block], starts[block] + counts[block]):
            j = places[k] - begin
            if j >= cols:
                while j >= cols:
                    i, begin, j = i + 1, begin + cols, j - cols
                r = ids[i] if ids.shape[0] else i
            if added is not None:
                added[r + 1] += 1
                places[k] = j
            if masks is not None:
                b = r * stride + 2 + (j >> 4)
                put(masks, b, np.uint16(at(masks, b) | (1 << (j & 15))))


@kernel
def _count_rows(masks, stride, blocks, edges, pointers, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    total = 0
    for r in range(edges[chunk], edges[chunk + 1]):
        for b in range(r * stride + 2, r * stride + 2 + blocks):
            total += count(bits(masks, b))
        pointers[r + 1] = total


@kernel
def _merge(crow, col, added_crow, added, out_crow, out, n_chunks, chunk):
    """Columns of two index sets without common members, as one."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    for r in range(split(out_crow, n_chunks, chunk), split(out_crow, n_chunks, chunk + 1)):
        i, i_end, j, j_end = crow[r], crow[r + 1], added_crow[r], added_crow[r + 1]
        k = out_crow[r]
        while i < i_end and j < j_end:
            a, b = np.int64(col[i]), np.int64(added[j])
            out[k] = min(a, b)
            k, i, j = k + 1, i + (a < b), j + (a > b)
        for rest in range(i, i_end):
            out[k] = col[rest]
            k += 1
        for rest in range(j, j_end):
            out[k] = added[rest]
            k += 1
