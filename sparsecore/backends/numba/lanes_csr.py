"""Products for a few examples, from CSR, with vectors along the batch for one nonzero after the other.

The examples are packed 4, 8 or 16 wide (``examples`` is a tuple of that length, a kernel each), larger batches 16 at a
time. Operands are handed over by address, as in `one_csr`: where a weight is small, a call takes longest to make
numpy arrays of them. Each thread packs the activations for itself; results of ``spmm_t`` alone depend on the number of
threads.

Limits were chosen where this was faster than what `linear` chooses otherwise: without AVX-512 on Zen 3, from batches of
2 to 96 with weights from 16 x 16 to 20000 x 600 and 600 x 20000; with it on Zen 5, from batches of 2 to 96 with weights
from 256 x 256 to 20000 x 600 and 600 x 20000.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.addresses import NUMBER, index_at, peek, plain, poke, split_at
from sparsecore.backends.numba.jit import device_function, kernel, operand, share_out
from sparsecore.backends.numba.lanes_rows import SPARE, add_row, dots_of_row, spread_row
from sparsecore.backends.numba.lanes_turn import TURNED, turn_back, turn_out
from sparsecore.backends.numba.memory import MOST_KEPT, result_of, scratch_tensor
from sparsecore.encoding import has_expand

__all__ = ["sddmm", "spmm", "spmm_t", "suits", "suits_gradient"]

_MOST_EXAMPLES = 96
_LEAST_WORK = (16384, 8192)  # multiply-adds of spmm and of its gradients, where `small` could do them
_SMALL = 1 << 14  # nonzeros
_MOST_NONZEROS = 1 << 17  # of a weight whose products are forward and small
_MOST_NUMBERS = 1 << 18  # of their result
# Examples of which panels of 32 (the first half of them) and 64 are not full; more than a panel of 64 holds.
_NOT_FULL, _HALF, _MORE = (17, 48), 32, 65
_LONG_ROW = 8  # nonzeros of a row (and a column), on average, that are worth its vectors
_FEW = {"spmm": 16, "spmm_t": 8, "sddmm": 16}  # examples for which no row is too short, without AVX-512
_FEW_GRADIENTS, _MOST_DOTS = 8, 16  # with it; of `sddmm` where rows are long
# Columns of a weight whose packed activations leave the nearest caches; examples that are few then, without AVX-512 and
# with it; the density of such weights from which panels are faster.
_WIDE, _FEW_AND_WIDE, _FEW_WIDE, _CROWDED = 4096, 8, 4, 0.2
_ROWS = 16  # whose sums are written together
# Multiply-adds of ``spmm_t`` from which several threads are worth the sums of each: many, or many for each column.
_LONG_SUMS, _WORTH_SUMS = 1 << 20, 200_000
_PACKED = 64  # columns that are packed at a time, into a few pages that stay in the cache
_EXAMPLES = {w: (np.int8(0),) * w for w in (4, 8, 16)}
_FLOATING = (torch.float32, torch.float64)


def suits(batch: int, nnz: int, shape: tuple[int, int], dtype: torch.dtype, in_blocks: bool = False) -> bool:
    """Whether this is the way to ``spmm`` of so many examples with a weight (rows, cols) in CSR.

    ``in_blocks``: it would be multiplied densely otherwise.
    """
    rows, cols = shape
    if (
        not 2 <= batch <= _MOST_EXAMPLES
        or (batch + 2) * nnz + rows <= _LEAST_WORK[0]
        or not _fits(len(_examples(batch)) * cols, dtype)
    ):
        return False
    small, wide, long = batch * rows <= _MOST_NUMBERS, cols > _WIDE, nnz >= _LONG_ROW * rows
    if has_expand():
        fits = nnz <= _MOST_NONZEROS and (not wide or batch <= _FEW_WIDE)
        return small and (nnz <= _SMALL or (fits and batch <= _NOT_FULL[1] and long))
    if batch <= _FEW["spmm"]:
        return not wide or batch <= _FEW_AND_WIDE
    if small and nnz <= _MOST_NONZEROS:
        return True
    return _no_panel_is_full(batch, nnz, shape) and (long or batch < _MORE) and not in_blocks


def suits_gradient(
    operation: str, batch: int, nnz: int, shape: tuple[int, int], dtype: torch.dtype, in_blocks: bool = False
) -> bool:
    """Whether this is the way to ``spmm_t`` or ``sddmm``."""
    w = len(_examples(batch))
    if (
        not 2 <= batch <= _MOST_EXAMPLES
        or (batch + 2) * nnz + shape[0] <= _LEAST_WORK[1]
        or not _fits((w * -(-batch // w) if operation == "spmm_t" else w) * shape[1], dtype)
    ):
        return False
    long = nnz >= _LONG_ROW * max(shape)
    if nnz <= _SMALL and batch <= _NOT_FULL[1]:
        return True
    if has_expand():
        return batch <= _FEW_GRADIENTS or (operation == "sddmm" and batch <= _MOST_DOTS and long)
    if batch <= _FEW[operation]:
        return True
    return _no_panel_is_full(batch, nnz, shape) and (long or batch > _HALF) and not in_blocks


def _no_panel_is_full(batch: int, nnz: int, shape: tuple[int, int]) -> bool:
    """Without AVX-512: whether a panel would be a good part empty, and rows are not so wide and crowded that it is
    faster nevertheless.
    """
    not_full = _NOT_FULL[0] <= batch <= _NOT_FULL[1]
    if shape[1] > _WIDE:
        return not_full and nnz < _CROWDED * shape[0] * shape[1]
    return not_full or batch >= _MORE


def _fits(numbers: int, dtype: torch.dtype) -> bool:
    """Whether a thread's scratch of so many numbers is little enough: of eight threads, kept for the next call.

    The number of threads there are does not matter: rounding depends on which way a product goes.
    """
    return dtype in _FLOATING and numbers * dtype.itemsize <= MOST_KEPT // 8


def _examples(batch: int) -> tuple[np.int8, ...]:
    return _EXAMPLES[4 if batch <= 4 else 8 if batch <= 8 else 16]


def spmm(values: Tensor, crow: Tensor, col: Tensor, x: Tensor, n_chunks: int) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    values, crow, col, x = plain(values), plain(crow), plain(col), operand(x)
    (batch, cols), rows = x.shape, crow.shape[0] - 1
    y = result_of(crow, "spmm", (batch, rows), x.dtype)
    index, kind, _, columns, column = index_at(crow, col)
    zero = NUMBER[x.dtype]
    examples = _examples(batch)
    size = len(examples) * (cols + SPARE + _ROWS)
    scratch = scratch_tensor("lanes", n_chunks * size, x.dtype)
    data = (values.data_ptr(), zero, x.data_ptr(), y.data_ptr(), scratch.data_ptr(), size)
    _sum_rows(index, kind, columns, column, *data, batch, rows, cols, examples, n_chunks)
    return y


def spmm_t(values: Tensor, crow: Tensor, col: Tensor, dy: Tensor, n_cols: int, n_chunks: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols). Its rounding depends on the number of chunks: each has its sums."""
    values, crow, col, dy = plain(values), plain(crow), plain(col), operand(dy)
    batch, rows = dy.shape
    dx = result_of(crow, "spmm_t", (batch, n_cols), dy.dtype)
    index, kind, _, columns, column = index_at(crow, col)
    examples = _examples(batch)
    w, zero = len(examples), NUMBER[dy.dtype]
    work = batch * values.shape[0]
    if work < _LONG_SUMS and work - 16 * batch * n_cols < _WORTH_SUMS:
        n_chunks = 1
    size = w * (-(-batch // w) * n_cols + SPARE + _ROWS)
    scratch = scratch_tensor("lanes", n_chunks * size, dy.dtype)
    data = (values.data_ptr(), zero, dy.data_ptr(), scratch.data_ptr(), size)
    _spread(index, kind, columns, column, *data, batch, rows, n_cols, examples, n_chunks)
    _add_up(scratch.data_ptr(), zero, size, w, batch, n_cols, n_chunks, dx.data_ptr(), n_chunks)
    return dx


def sddmm(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor, nnz: int, n_chunks: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    crow, col, dy, x = plain(crow), plain(col), operand(dy), operand(x)
    (batch, cols), rows = x.shape, dy.shape[1]
    out = result_of(crow, "gradient", (nnz,), x.dtype)
    index, kind, _, columns, column = index_at(crow, col)
    examples = _examples(batch)
    size = len(examples) * (cols + SPARE + _ROWS)
    scratch = scratch_tensor("lanes", n_chunks * size, x.dtype)
    data = (dy.data_ptr(), NUMBER[x.dtype], x.data_ptr(), out.data_ptr(), scratch.data_ptr(), size)
    _dots(index, kind, columns, column, *data, batch, rows, cols, examples, n_chunks)
    return out


@kernel
def _sum_rows(
    index,
    kind,
    columns,
    column,
    values,
    zero,
    x,
    y,
    scratch,
    size,
    batch,
    rows,
    cols,
    examples,
    n_chunks,
    chunk,
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    w = len(examples)
    first, last = _rows_of(index, kind, rows, n_chunks, chunk)
    limit = np.int64(peek(index, rows, kind))
    tile = chunk * size
    panel = tile + _ROWS * w
    for slab in range(0, batch, w):
        n = min(w, batch - slab)
        _pack(x, zero, slab, n, cols, scratch, panel, w)
        for start in range(first, last, _ROWS):
            stop = min(start + _ROWS, last)
            begin = np.int64(peek(index, start, kind))
            for row in range(start, stop):
                end = np.int64(peek(index, row + 1, kind))
                place = tile + (row - start) * w
                add_row(
                    values, begin, end, limit, columns, column, scratch, panel, cols, place, zero, examples
                )
                begin = end
            if stop - start == _ROWS:
                for e in range(0, n, TURNED):
                    turn_out(scratch, tile + e, w, y, (slab + e) * rows + start, rows, n - e, zero)
            else:
                for e in range(n):
                    out = (slab + e) * rows + start
                    for i in range(stop - start):
                        poke(y, out + i, peek(scratch, tile + i * w + e, zero))


@kernel
def _dots(
    index,
    kind,
    columns,
    column,
    dy,
    zero,
    x,
    out,
    scratch,
    size,
    batch,
    rows,
    cols,
    examples,
    n_chunks,
    chunk,
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    w = len(examples)
    first, last = _rows_of(index, kind, rows, n_chunks, chunk)
    tile = chunk * size
    panel = tile + _ROWS * w
    for slab in range(0, batch, w):
        n = min(w, batch - slab)
        _pack(x, zero, slab, n, cols, scratch, panel, w)
        for start in range(first, last, _ROWS):
            stop = min(start + _ROWS, last)
            _pack_rows(dy, zero, slab, n, rows, start, stop, scratch, tile, w)
            begin = np.int64(peek(index, start, kind))
            for row in range(start, stop):
                end = np.int64(peek(index, row + 1, kind))
                place = tile + (row - start) * w
                dots_of_row(begin, end, columns, column, scratch, panel, place, out, slab > 0, zero, examples)
                begin = end


@kernel
def _spread(
    index,
    kind,
    columns,
    column,
    values,
    zero,
    dy,
    scratch,
    size,
    batch,
    rows,
    cols,
    examples,
    n_chunks,
    chunk,
):
    """The sums of a chunk's rows: for 16 (or w) examples after the other, w of each column."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    w = len(examples)
    first, last = _rows_of(index, kind, rows, n_chunks, chunk)
    limit = np.int64(peek(index, rows, kind))
    tile = chunk * size
    sums = tile + _ROWS * w
    for i in range(sums, tile + size):
        poke(scratch, i, zero)
    for start in range(first, last, _ROWS):
        stop = min(start + _ROWS, last)
        for slab in range(0, batch, w):
            _pack_rows(dy, zero, slab, min(w, batch - slab), rows, start, stop, scratch, tile, w)
            behind = (-(-batch // w) - slab // w) * cols
            begin = np.int64(peek(index, start, kind))
            for row in range(start, stop):
                end = np.int64(peek(index, row + 1, kind))
                place, total = tile + (row - start) * w, sums + slab * cols
                spread_row(
                    values, begin, end, limit, columns, column, scratch, total, behind, place, zero, examples
                )
                begin = end


@kernel
def _add_up(scratch, zero, size, w, batch, cols, parts, dx, n_chunks, chunk):
    """Add the chunks' sums up, in their order, and unpack them."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    first, last = cols * chunk // n_chunks, cols * (chunk + 1) // n_chunks
    for begin in range(first, last, _PACKED):
        end = min(begin + _PACKED, last)
        for e in range(batch):
            source = _ROWS * w + e // w * w * cols + e % w
            for j in range(begin, end):
                total = peek(scratch, source + w * j, zero)
                for part in range(1, parts):
                    total += peek(scratch, part * size + source + w * j, zero)
                poke(dx, e * cols + j, total)


@device_function
def _rows_of(index, kind, rows, n_chunks, chunk):
    return split_at(index, kind, rows, n_chunks, chunk), split_at(index, kind, rows, n_chunks, chunk + 1)


@device_function
def _pack_rows(dy, zero, first, n, rows, start, stop, scratch, tile, w):
    """scratch[tile + w * i + e] = dy[first + e, start + i] of n examples, 0 in lanes that are left."""
    if stop - start == _ROWS:
        for e in range(0, w, TURNED):
            turn_back(dy, (first + e) * rows + start, rows, scratch, tile + e, w, n - e, zero)
    else:
        for e in range(w):
            source = (first + e) * rows + start
            for i in range(stop - start):
                poke(scratch, tile + i * w + e, peek(dy, source + i, zero) if e < n else zero)


@device_function
def _pack(x, zero, first, n, cols, scratch, panel, w):
    """scratch[panel + w * j + e] = x[first + e, j] of n examples, 0 in lanes that are left and in a column ``cols``."""
    for e in range(w):
        poke(scratch, panel + w * cols + e, zero)
    for begin in range(0, cols, _PACKED):
        end = min(begin + _PACKED, cols)
        for e in range(w):
            source = (first + e) * cols
            for j in range(begin, end):
                poke(scratch, panel + w * j + e, peek(x, source + j, zero) if e < n else zero)
