"""Propagation of embeddings over a graph.

A row of the product is summed in registers, up to 64 columns at a time, with what is to be added to it, and written
once. Its edges lie together, but the rows of X that they ask for are anywhere: these are asked for 32 edges ahead (16
and 96 took longer, and so did two edges in flight at once).

Sums run in the order of the graph's columns whatever the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.jit import array, device_function, kernel, share_out, split, threads
from sparsecore.backends.numba.simd import (
    add,
    at,
    bits,
    compress,
    count,
    first_lanes,
    fma,
    load,
    load_masked,
    mul,
    prefetch,
    prefetch_far,
    splat,
    store,
    store_masked,
    unpack,
    zeros,
)
from sparsecore.backends.numba.table_rows import AHEAD, EDGES_AHEAD, add_rows, number, sample

__all__ = ["propagate", "propagate_sample"]


Table = tuple[Tensor, Tensor, Tensor | None]  # values, crow, col
_NO_INDEX = np.zeros((1, 2), np.int32)


def propagate(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    x: Tensor,
    *,
    base: Tensor | None = None,
    table: Table | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``scale (A X + base + E)`` for a graph A in CSR: X (N, d) -> (M, d).

    Args:
        crow, col, weight: the graph.
        x: dense.
        base: dense, added to the product.
        table: sparse, added to the product.
        scale: factor of the sum.
    """
    out = torch.empty((crow.numel() - 1, x.shape[1]), dtype=x.dtype, device="cpu")
    if table is None or table[2] is not None:
        _run(crow, col, weight, x, base, None, scale, False, out)
        return out if table is None else add_rows(out, *table, scale)
    _run(crow, col, weight, x, base, table, scale, False, out)
    return out


def propagate_sample(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    x: Tensor,
    base: Tensor | None,
    t_crow: Tensor,
    t_col: Tensor | None,
    nnz: int,
    scale: float = 1.0,
) -> Tensor:
    """``scale (A X + base)`` at the nonzeros of a pattern: (nnz,). With a bitmap the dense sum never exists."""
    if t_col is not None:
        return sample(t_crow, t_col, propagate(crow, col, weight, x, base=base, scale=scale), nnz)
    out = torch.empty(nnz, dtype=x.dtype, device="cpu")
    _run(crow, col, weight, x, base, (x, t_crow, None), scale, True, out)
    return out


def _run(
    crow: Tensor, col: Tensor, weight: Tensor, x: Tensor, base: Tensor | None, bitmap: Table | None, scale: float,
    take: bool, out: Tensor,
) -> None:  # fmt: skip
    """The kernel, with something of the right type for what is absent."""
    dense = array(x)
    values, index = (array(bitmap[0]), array(bitmap[1])) if bitmap else (dense, _NO_INDEX)
    _propagate(
        *map(array, (crow, col, weight)), dense, dense if base is None else array(base), base is not None,
        values.reshape(-1), index, index.view(np.uint16), bitmap is not None and not take, number(scale, x), take,
        out.view(-1).numpy(), threads(col.numel() * x.shape[1]),
    )  # fmt: skip


@device_function
def _take(total, factor, out, masks, block, k):
    """Write the entries of a block at the mask from k on; returns the next k."""
    mask = bits(masks, block)
    n = count(mask)
    store_masked(out, k, compress(mul(factor, total), mask), first_lanes(n))
    return k + n


@device_function
def _finish(total, lanes, factor, base, plus_base, values, masks, plus_table, take, out, block, place, k):
    """What is left to do with the sums of up to 16 columns; returns the next k."""
    if plus_base:
        total = add(total, load_masked(base, place, lanes))
    if plus_table:
        mask = bits(masks, block)
        total = add(total, unpack(values, k, mask))
        k += count(mask)
    if take:
        return _take(total, factor, out, masks, block, k)
    store_masked(out, place, mul(factor, total), lanes)
    return k


@kernel
def _propagate(
    crow, col, weight, x, base, plus_base, values, index, masks, plus_table, scale, take, out, n_chunks, chunk
):  # fmt: skip
    if chunk < 0:
        return share_out(chunk, n_chunks)
    # No helper function with a branch in it, here and below: references to arrays would be counted row by row.
    d, words = x.shape[1], index.shape[1]
    end = col.shape[0] - 1
    zero, factor = zeros(x), splat(scale)
    step = words if take or plus_table else 0  # the index of an absent table has one row
    for i in range(split(crow, n_chunks, chunk), split(crow, n_chunks, chunk + 1)):
        first, last = np.int64(crow[i]), np.int64(crow[i + 1])
        k = np.int64(at(index, i * step))
        block, place = 2 * i * step + 2, i * d
        c = 0
        while c + 64 <= d:
            if plus_table:
                prefetch(index, (i + 4) * step)
                prefetch(values, k + AHEAD)
                prefetch(values, k + AHEAD + 16)
            if plus_base:
                prefetch(base, place + d)
                prefetch(base, place + d + 16)
                prefetch(base, place + d + 32)
                prefetch(base, place + d + 48)
            s0, s1, s2, s3 = zero, zero, zero, zero
            for e in range(first, last):
                soon = np.int64(at(col, min(e + EDGES_AHEAD, end))) * d + c
                prefetch_far(x, soon)
                prefetch_far(x, soon + 16)
                prefetch_far(x, soon + 32)
                prefetch_far(x, soon + 48)
                a, row = splat(at(weight, e)), np.int64(at(col, e)) * d + c
                s0 = fma(a, load(x, row), s0)
                s1 = fma(a, load(x, row + 16), s1)
                s2 = fma(a, load(x, row + 32), s2)
                s3 = fma(a, load(x, row + 48), s3)
            if plus_base:
                s0 = add(s0, load(base, place))
                s1 = add(s1, load(base, place + 16))
                s2 = add(s2, load(base, place + 32))
                s3 = add(s3, load(base, place + 48))
            if plus_table:
                m0, m1, m2, m3 = (
                    bits(masks, block),
                    bits(masks, block + 1),
                    bits(masks, block + 2),
                    bits(masks, block + 3),
                )
                s0 = add(s0, unpack(values, k, m0))
                k += count(m0)
                s1 = add(s1, unpack(values, k, m1))
                k += count(m1)
                s2 = add(s2, unpack(values, k, m2))
                k += count(m2)
                s3 = add(s3, unpack(values, k, m3))
                k += count(m3)
            if take:
                k = _take(s0, factor, out, masks, block, k)
                k = _take(s1, factor, out, masks, block + 1, k)
                k = _take(s2, factor, out, masks, block + 2, k)
                k = _take(s3, factor, out, masks, block + 3, k)
            else:
                store(out, place, mul(factor, s0))
                store(out, place + 16, mul(factor, s1))
                store(out, place + 32, mul(factor, s2))
                store(out, place + 48, mul(factor, s3))
            c += 64
            block += 4
            place += 64
        left = d - c
        if left > 32:  # in one pass over the edges, too
            l2, l3 = first_lanes(min(left - 32, 16)), first_lanes(max(left - 48, 0))
            s0, s1, s2, s3 = zero, zero, zero, zero
            for e in range(first, last):
                soon = np.int64(at(col, min(e + EDGES_AHEAD, end))) * d + c
                prefetch_far(x, soon)
                prefetch_far(x, soon + 16)
                prefetch_far(x, soon + 32)
                a, row = splat(at(weight, e)), np.int64(at(col, e)) * d + c
                s0 = fma(a, load(x, row), s0)
                s1 = fma(a, load(x, row + 16), s1)
                s2 = fma(a, load_masked(x, row + 32, l2), s2)
                s3 = fma(a, load_masked(x, row + 48, l3), s3)
            every = first_lanes(16)
            k = _finish(
                s0, every, factor, base, plus_base, values, masks, plus_table, take, out, block, place, k
            )
            k = _finish(
                s1, every, factor, base, plus_base, values, masks, plus_table, take, out, block + 1, place + 16, k
            )  # fmt: skip
            k = _finish(
                s2, l2, factor, base, plus_base, values, masks, plus_table, take, out, block + 2, place + 32, k
            )  # fmt: skip
            if left > 48:
                k = _finish(
                    s3, l3, factor, base, plus_base, values, masks, plus_table, take, out, block + 3, place + 48, k
                )  # fmt: skip
        elif left > 16:
            l1 = first_lanes(left - 16)
            s0, s1 = zero, zero
            for e in range(first, last):
                soon = np.int64(at(col, min(e + EDGES_AHEAD, end))) * d + c
                prefetch_far(x, soon)
                prefetch_far(x, soon + 16)
                a, row = splat(at(weight, e)), np.int64(at(col, e)) * d + c
                s0 = fma(a, load(x, row), s0)
                s1 = fma(a, load_masked(x, row + 16, l1), s1)
            k = _finish(
                s0, first_lanes(16), factor, base, plus_base, values, masks, plus_table, take, out, block, place, k
            )  # fmt: skip
            k = _finish(
                s1, l1, factor, base, plus_base, values, masks, plus_table, take, out, block + 1, place + 16, k
            )  # fmt: skip
        elif left > 0:
            lanes, s0 = first_lanes(left), zero
            for e in range(first, last):
                prefetch(x, np.int64(at(col, min(e + EDGES_AHEAD, end))) * d + c)
                row = np.int64(at(col, e)) * d + c
                s0 = fma(splat(at(weight, e)), load_masked(x, row, lanes), s0)
            k = _finish(
                s0, lanes, factor, base, plus_base, values, masks, plus_table, take, out, block, place, k
            )
