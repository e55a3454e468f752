"""From one index set to another of as many nonzeros: values and state move in place; the history of what was stored.

Order is kept, so each range of rows moves left or right as one. A range is put together in a small buffer, and written
after what lies in its way has moved: those that move right from the last to the first, all others from the first on.
What crosses from one thread's memory into another's waits in a side buffer until all are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.index_set import IndexSet, chunk_edges
from sparsecore.backends.numba.jit import kernel, share_out, threads
from sparsecore.backends.numba.memory import TYPES, workspace
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
)
from sparsecore.backends.torch import explore as reference
from sparsecore.ops.explore import Index

__all__ = ["realign_", "record_"]

_TILE = 4096  # positions of a range: its buffer stays in the first-level cache


def realign_(tensors: Sequence[tuple[Tensor, float]], old: Index, new: Index, shape: tuple[int, int]) -> int:
    """Move the numbers of the nonzeros of ``old`` to their places in ``new``; returns how many positions both have."""
    kept, source, target = 0, IndexSet(old, shape), IndexSet(new, shape)
    for dtype in sorted({tensor.dtype for tensor, _ in tensors}, key=str):
        some = [pair for pair in tensors if pair[0].dtype == dtype]
        if dtype not in (torch.float32, torch.float64):  # no optimizer of torch has such a state
            kept = reference.realign_(some, old, new, shape)
            continue
        numbers = [tensor.detach().contiguous() for tensor, _ in some]
        kept = _move(tuple(x.numpy() for x in numbers), [fresh for _, fresh in some], source, target)
        for (tensor, _), moved in zip(some, numbers, strict=True):
            if moved.data_ptr() != tensor.data_ptr():
                tensor.copy_(moved)
    return kept


def _move(tensors: tuple[np.ndarray, ...], fresh: list[float], source: IndexSet, target: IndexSet) -> int:
    cols, dtype = source.shape[1], tensors[0].dtype
    n_chunks = threads(source.work)
    edges = chunk_edges(source, n_chunks)
    begin, end = source.pointers[edges[:-1]].astype(np.int64), source.pointers[edges[1:]].astype(np.int64)
    first, last = target.pointers[edges[:-1]].astype(np.int64), target.pointers[edges[1:]].astype(np.int64)
    left = np.minimum(np.maximum(begin - first, 0), last - first)
    right = np.minimum(np.maximum(last - end, 0), last - first)
    ends = (left + right).cumsum()
    aside, height = np.empty((len(tensors), ends[-1]), dtype), max(1, _TILE // cols)
    kept = np.zeros(n_chunks, np.int64)
    _realign(
        tensors, np.repeat(np.array(fresh, dtype), 16), source.pointers, source.columns, source.masks, target.pointers,
        target.columns, target.masks, source.stride, cols, height, edges, begin, end, left,
        ends - right - left, aside, kept, workspace("rewritten", n_chunks, height * cols + 16, TYPES[dtype]),
        workspace("origins", n_chunks, height * cols, torch.int32), n_chunks,
    )  # fmt: skip
    for chunk in range(n_chunks):
        middle = ends[chunk] - right[chunk]
        for numbers, waiting in zip(tensors, aside, strict=True):
            numbers[first[chunk] : first[chunk] + left[chunk]] = waiting[middle - left[chunk] : middle]
            numbers[last[chunk] - right[chunk] : last[chunk]] = waiting[middle : ends[chunk]]
    return int(kept.sum())


def record_(history: Tensor, tensors: Index, shape: tuple[int, int]) -> int:
    """Set the bit of every stored position, row * cols + column; returns how many were not set before."""
    index = IndexSet(tensors, shape)
    n_chunks = min(threads(index.work), -(-index.rows // 8))
    edges = index.rows * np.arange(n_chunks + 1) // n_chunks // 8 * 8  # no byte belongs to two chunks
    edges[-1] = index.rows
    unseen = np.zeros(n_chunks, np.int64)
    _record(history.numpy(), *index.arrays(), shape[1], edges, unseen, n_chunks)
    return int(unseen.sum())


@kernel
def _realign(
    tensors, fresh, pointers, col, masks, new_pointers, new_col, new_masks, stride, cols, height, edges, begin, end,
    left, aside_at, aside, kept, buffers, origins, n_chunks, chunk,
):  # fmt: skip
    if chunk < 0:
        return share_out(chunk, n_chunks)
    first, last, lower, upper = edges[chunk], edges[chunk + 1], begin[chunk], end[chunk]
    buffer, origin = buffers[chunk], origins[chunk]  # of every number of a range: where it was, or -1
    start = np.int64(new_pointers[first])
    aside_left = aside_at[chunk]
    aside_right = aside_left + left[chunk]
    moved = 0
    r = first
    while r < last:
        top = r
        while top + height < last and new_pointers[top + height] > pointers[top + height]:
            top += height
        for low in range(top, r - 1, -height):
            high = min(low + height, last)
            here = np.int64(pointers[low])
            place = np.int64(new_pointers[low])
            n = new_pointers[high] - place
            following = top + height if low == r else low - height
            leap = np.int64(pointers[min(following, last)]) - here
            if col is not None:
                q = 0
                for row in range(low, high):
                    i, i_end = pointers[row], pointers[row + 1]
                    j, j_end = new_pointers[row], new_pointers[row + 1]
                    while i < i_end and j < j_end:
                        a, b = col[i], new_col[j]
                        origin[q] = i - here if a == b else -1
                        moved += a == b
                        i, j, q = i + (a <= b), j + (b <= a), q + (b <= a)
                    for _ in range(j, j_end):
                        origin[q] = -1
                        q += 1
            if masks is not None:
                for row in range(low, high):
                    for w in range(row * stride + 2, row * stride + 2 + (cols + 15) // 16):
                        moved += count(np.uint16(bits(masks, w) & bits(new_masks, w)))
            for t in range(len(tensors)):
                numbers, begun = tensors[t], fresh[16 * t]
                if col is not None:
                    base = min(here, numbers.shape[0] - 1)
                    for e in range(n):
                        x = numbers[base + max(origin[e], 0)]
                        buffer[e] = x if origin[e] >= 0 else begun
                if masks is not None:
                    k, e = here, 0
                    for row in range(low, high):
                        for w in range(row * stride + 2, row * stride + 2 + (cols + 15) // 16):
                            m, new = bits(masks, w), bits(new_masks, w)
                            prefetch(numbers, k + leap)
                            v = unpack(numbers, k, m)
                            if begun != 0:
                                v = add(v, load_masked(fresh, 16 * t, np.uint16(~m)))
                            store(buffer, e, compress(v, new))
                            k += count(m)
                            e += count(new)
                before, behind = min(max(lower - place, 0), n), min(max(place + n - upper, 0), n)
                for e in range(before):
                    aside[t, aside_left + place + e - start] = buffer[e]
                for e in range(n - behind, n):
                    aside[t, aside_right + place + e - max(upper, start)] = buffer[e]
                e, stop = before, n - behind
                while e + 16 <= stop:
                    store(numbers, place + e, load(buffer, e))
                    e += 16
                if e < stop:
                    lanes = first_lanes(stop - e)
                    store_masked(numbers, place + e, load_masked(buffer, e, lanes), lanes)
        r = min(top + height, last)
    kept[chunk] = moved


@kernel
def _record(history, pointers, col, masks, stride, cols, edges, unseen, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    found = 0
    for r in range(edges[chunk], edges[chunk + 1]):
        if col is not None:
            for k in range(pointers[r], pointers[r + 1]):
                position = r * cols + np.int64(col[k])
                byte, bit = np.int64(history[position >> 3]), 1 << (position & 7)
                found += (byte & bit) == 0
                history[position >> 3] = byte | bit
        if masks is not None:
            for b in range((cols + 15) // 16):
                position = r * cols + 16 * b
                m = np.int64(bits(masks, r * stride + 2 + b)) << (position & 7)
                place = position >> 3
                while m != 0:
                    byte = np.int64(at(history, place))
                    found += count(np.uint64(m & 255 & ~byte))
                    put(history, place, np.uint8(byte | (m & 255)))
                    m >>= 8
                    place += 1
    unseen[chunk] = found
