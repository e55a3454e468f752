"""Adam on the rows that a batch looked up, straight from their gradients: no gradient of the values is made.

One parallel region: every thread takes its share of the rows, sorts their entries, and then sums and updates
row after row. Rows are computed by themselves and entries in their order, so results do not depend on the number
of threads, and are those of `scatter.touched_spans` and `optimizer.adam_` to the bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from sparsecore.backends.numba.embedding import masks_of, prefetch_lines
from sparsecore.backends.numba.grouping import digits_of, sort_keys
from sparsecore.backends.numba.jit import array, kernel, share_out, threads
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.optimizer import adam_parts, adam_span, flat, prefetch_span, splats
from sparsecore.backends.numba.processor import VALUES_AHEAD
from sparsecore.backends.numba.scatter import STRIP, pack_row, take_row
from sparsecore.backends.numba.simd import LANES, at, prefetch_far, put
from sparsecore.backends.numba.spans import LINE, MOST_LINES, SPANS_AHEAD

__all__ = ["adam_rows_"]

_NONE = np.zeros(1, np.int64)
_SCATTERED = 0x9E3779B1  # bits 16 to 31 of its product with a row share rows out evenly, whatever their order
_ROWS = 1024  # whose sums stand in scratch at a time: of 64 numbers at density 0.5, 128 KiB


def adam_rows_(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    sources: Tensor | None,
    weights: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: float,
    step_per_weight: Tensor | None = None,
) -> None:
    """`adam_` for the gradient that `touched` makes of the same lookup: at the nonzeros of looked-up rows alone."""
    summands, entries, index = array(grad), array(ids), array(crow)
    parts = adam_parts(summands.dtype, lr, betas, eps, weight_decay, decoupled, step, step_per_weight)
    bags, scales, weighted = _NONE, np.ones(1, summands.dtype), 0
    if sources is not None and weights is not None:
        bags, scales, weighted = array(sources), array(weights), 1
    columns = masks_of(index) if col is None else array(col)
    rest = (entries, bags, scales, weighted, summands, flat(values), flat(exp_avg), flat(exp_avg_sq), *parts)
    entered, n = entries.shape[0], threads(grad.numel())
    passes, digits = digits_of(crow.shape[0] - 1)
    sums = workspace("row sums", n, _ROWS * summands.shape[1] + LANES + STRIP, grad.dtype)
    scaled = workspace("row weights", n, entered * weighted + 1, grad.dtype)
    lists = workspace("row lists", n, 6 * entered + 2 + (1 << digits), torch.int64)
    _adam_rows(index, columns, *rest, sums, scaled, lists, entered.bit_length(), passes, digits, n)


def row_begin(index, row):
    """Where the values of a row begin, in either encoding."""
    raise NotImplementedError


def ask_for_row(index, row):
    """Prefetch what `row_begin` reads."""
    raise NotImplementedError


def sum_row(index, columns, row, source, weights, step, begin, end, grad, d, out, place, strip):
    """Sum of entries at the columns that a row stores, to ``out[place:]``."""
    raise NotImplementedError


@overload(row_begin, inline="always")
def _row_begin(index, row):
    if index.ndim == 2:
        return lambda index, row: np.int64(at(index, row * index.shape[1]))
    return lambda index, row: np.int64(at(index, row))


@overload(ask_for_row, inline="always")
def _ask_for_row(index, row):
    if index.ndim == 2:
        return lambda index, row: prefetch_far(index, row * index.shape[1])
    return lambda index, row: prefetch_far(index, row)


@overload(sum_row, inline="always")
def _sum_row(index, columns, row, source, weights, step, begin, end, grad, d, out, place, strip):
    def bitmap(index, columns, row, source, weights, step, begin, end, grad, d, out, place, strip):
        pack_row(columns, row * columns.shape[1] + 2, source, weights, step, begin, end, grad, d, out, place)

    def csr(index, columns, row, source, weights, step, begin, end, grad, d, out, place, strip):
        first = np.int64(at(index, row))
        stored = np.int64(at(index, row + 1)) - first
        take_row(columns, first, stored, source, weights, step, begin, end, grad, d, out, place, strip)

    return bitmap if index.ndim == 2 else csr


@kernel
def _adam_rows(
    index, columns, ids, bags, scales, weighted, grad, values, exp_avg, exp_avg_sq,
    counts, first, second, constants, sums, scaled, lists, shift, passes, digits, n_chunks, chunk,
):  # fmt: skip
    if chunk < 0:
        return share_out(chunk, n_chunks)
    d, line = grad.shape[1], LINE // grad.itemsize
    lines = min(MOST_LINES, -(-d // line))
    c = splats(constants)
    entered, own = ids.shape[0], lists[chunk]
    keys, spare, digit_counts = own[:entered], own[entered : 2 * entered], own[6 * entered + 2 :]
    n = 0
    for e in range(entered):
        row = np.int64(at(ids, e))
        put(keys, n, (row << shift) | e)
        # No branch: it would be foreseen half the time.
        n += ((row * _SCATTERED >> 16 & 0xFFFF) * n_chunks >> 16) == chunk
        ask_for_row(index, at(keys, max(n - 1, 0)) >> shift)
    keys, source = sort_keys(keys, spare, digit_counts, n, shift, passes, digits)
    rows, begins = own[2 * entered : 3 * entered], own[3 * entered : 4 * entered]
    starts, places = own[4 * entered : 5 * entered + 1], own[5 * entered + 1 : 6 * entered + 2]
    weights, sums = scaled[chunk], sums[chunk]
    strip = sums[_ROWS * d + LANES :]
    weights[0] = 1
    found, total, before = 0, 0, np.int64(-1)
    for e in range(n):
        row, entry = at(keys, e) >> shift, at(keys, e) & ((1 << shift) - 1)
        if weighted:
            put(source, e, np.int64(at(bags, entry)))
            put(weights, e, at(scales, entry))
        else:
            put(source, e, entry)
        if row != before:
            before = row
            put(rows, found, row)
            put(starts, found, e)
            put(places, found, total)
            p = row_begin(index, row)
            put(begins, found, p)
            total += row_begin(index, row + 1) - p
            found += 1
    put(starts, found, n)
    put(places, found, total)
    # Sums of a part of the rows, then their updates: in turns, an update would wait for its row's sums.
    for top in range(0, found, _ROWS):
        bottom, base = min(top + _ROWS, found), at(places, top)
        for u in range(top, bottom):
            if u + VALUES_AHEAD < found:
                prefetch_lines(grad, at(source, at(starts, u + VALUES_AHEAD)) * d, lines)
            row, o, begin, end = at(rows, u), at(places, u) - base, at(starts, u), at(starts, u + 1)
            sum_row(index, columns, row, source, weights, weighted, begin, end, grad, d, sums, o, strip)
        for u in range(top, bottom):
            if u + SPANS_AHEAD < found:
                p = at(begins, u + SPANS_AHEAD)
                stored = at(places, u + SPANS_AHEAD + 1) - at(places, u + SPANS_AHEAD)
                prefetch_span(values, exp_avg, exp_avg_sq, p, p + stored - 1, line)
            p, i, end = at(begins, u), at(places, u) - base, at(places, u + 1) - base
            adam_span(p, i, end, values, sums, exp_avg, exp_avg_sq, counts, first, second, constants, c)
