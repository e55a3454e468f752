"""Propagation where only some nodes count: those whose result is wanted, or those that have a gradient.

The last hop of a model that scores a batch is wanted at the batch's nodes alone, and the first hop backward begins at
these.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.graph import propagate
from sparsecore.backends.numba.jit import array, kernel, serial_kernel, share_out, split, threads
from sparsecore.backends.numba.simd import (
    at,
    first_lanes,
    fma,
    load,
    load_masked,
    prefetch,
    put,
    splat,
    store,
    store_masked,
    zeros,
)

__all__ = ["propagate_from", "propagate_rows"]

_EDGES_AHEAD = 16


def propagate_rows(crow: Tensor, col: Tensor, weight: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """``(A X)[ids]`` for a graph A in CSR: X (N, d), ids (n,) -> (n, d).

    The edges of the ids are copied, one node after the other: 8 bytes an edge, beside 4 d bytes that each reads.
    """
    pointers, chosen = array(crow), array(ids)
    starts = np.zeros(chosen.size + 1, pointers.dtype)
    np.cumsum(pointers[chosen + 1] - pointers[chosen], out=starts[1:])
    size = int(starts[-1])
    columns, weights = col.new_empty(size), weight.new_empty(size)
    into = columns.numpy(), weights.numpy(), threads(4 * size)
    _copy_edges(pointers, array(col), array(weight), chosen, starts, *into)
    return propagate(torch.from_numpy(starts), columns, weights, x)


def propagate_from(crow: Tensor, col: Tensor, weight: Tensor, x: Tensor, ids: Tensor, n: int) -> Tensor:
    """``A Z`` where Z, of n rows, is 0 but for the sums of rows of X with the same id: X (m, d) -> (M, d).

    Every edge is looked at; what it asks for is read where there is something, from rows that lie together.
    """
    rows, place = torch.empty_like(x, memory_format=torch.contiguous_format).numpy(), np.empty(n, np.int32)
    _collect(array(ids), array(x), rows, place)
    out = torch.empty((crow.numel() - 1, x.shape[1]), dtype=x.dtype, device="cpu")
    # An edge that is not followed costs about as much as two multiply-adds of vectors.
    work = threads(32 * col.numel())
    _propagate_from(array(crow), array(col), array(weight), rows, place, out.numpy(), work)
    return out


@kernel
def _copy_edges(crow, col, weight, ids, starts, columns, weights, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = ids.shape[0]
    for i in range(n * chunk // n_chunks, n * (chunk + 1) // n_chunks):
        source, target = np.int64(at(crow, np.int64(at(ids, i)))), np.int64(at(starts, i))
        for k in range(np.int64(at(starts, i + 1)) - target):
            put(columns, target + k, at(col, source + k))
            put(weights, target + k, at(weight, source + k))


@serial_kernel
def _collect(ids, x, rows, place):
    """Sums of the rows of x by their id, in the order of their first entry; where each id's sum lies, -1: nowhere."""
    d = x.shape[1]
    place[:] = -1
    found = 0
    for e in range(ids.shape[0]):
        p = np.int64(place[ids[e]])
        if p < 0:
            place[ids[e]] = found
            for j in range(d):
                rows[found, j] = x[e, j]
            found += 1
        else:
            for j in range(d):
                rows[p, j] += x[e, j]


@kernel
def _propagate_from(crow, col, weight, x, place, out, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d = x.shape[1]
    end = col.shape[0] - 1
    zero = zeros(x)
    for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
        first, last = np.int64(at(crow, i)), np.int64(at(crow, i + 1))
        c = 0
        while c + 64 <= d:
            s0, s1, s2, s3 = zero, zero, zero, zero
            for e in range(first, last):
                prefetch(place, np.int64(at(col, min(e + _EDGES_AHEAD, end))))
                p = np.int64(at(place, np.int64(at(col, e))))
                if p >= 0:
                    a, row = splat(at(weight, e)), p * d + c
                    s0 = fma(a, load(x, row), s0)
                    s1 = fma(a, load(x, row + 16), s1)
                    s2 = fma(a, load(x, row + 32), s2)
                    s3 = fma(a, load(x, row + 48), s3)
            target = i * d + c
            store(out, target, s0)
            store(out, target + 16, s1)
            store(out, target + 32, s2)
            store(out, target + 48, s3)
            c += 64
        while c < d:
            lanes = first_lanes(min(16, d - c))
            s0 = zero
            for e in range(first, last):
                p = np.int64(at(place, np.int64(at(col, e))))
                if p >= 0:
                    s0 = fma(splat(at(weight, e)), load_masked(x, p * d + c, lanes), s0)
            store_masked(out, i * d + c, s0, lanes)
            c += 16
