"""Calls so small that what surrounds a kernel costs more than its arithmetic.

Vectors, tiles and groups of equal ids pay only where there is work for them. Here every operation is one serial kernel
over single numbers, which is handed addresses.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.addresses import NUMBER, index_at, peek, plain, poke
from sparsecore.backends.numba.jit import device_function, operand, serial_kernel
from sparsecore.backends.numba.simd import lowest

__all__ = [
    "gather",
    "id_range",
    "is_small_lookup",
    "is_small_product",
    "scatter_grad_",
    "sddmm",
    "spmm",
    "spmm_t",
]

# Up to here these kernels were faster on Zen 4, at densities 0.5 and 0.1 and in both encodings: rows from a table that
# no cache holds, layers of up to 128 x 128 with batches from 1 to 64.
_MOST_NUMBERS = 4096  # to look up
_MOST_WORK = 24576  # multiply-adds of a product; to find a weight's columns takes as long as two examples

_FLOATING = (torch.float32, torch.float64)


def is_small_lookup(numbers: int, dtype: torch.dtype) -> bool:
    """Whether this many numbers of a table are few, and of a type that is computed with."""
    return numbers <= _MOST_NUMBERS and dtype in _FLOATING


def is_small_product(batch: int, nnz: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether a product of this many examples with a weight is small."""
    return (batch + 2) * nnz + rows <= _MOST_WORK and dtype in _FLOATING


def id_range(ids: Tensor) -> tuple[int, int]:
    """Smallest and largest of some ids on the CPU, at least one. They are in the cache when the lookup wants them."""
    ids = plain(ids)
    return _range(ids.data_ptr(), NUMBER[ids.dtype], ids.numel())


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    values, crow, col, ids = plain(values), plain(crow), plain(col), _numbers(ids)
    out = values.new_empty(ids.shape[0], n_cols)
    data = (values.data_ptr(), NUMBER[values.dtype], ids.data_ptr(), NUMBER[ids.dtype], out.data_ptr())
    _gather(*index_at(crow, col), *data, ids.shape[0], n_cols)
    return out


def scatter_grad_(out: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor) -> Tensor:
    """``out[k] += sum of grad[e, col[k]]`` over the entries e whose id is the row of nonzero k."""
    crow, col, ids, grad = plain(crow), plain(col), _numbers(ids), operand(grad)
    data = (ids.data_ptr(), NUMBER[ids.dtype], grad.data_ptr(), NUMBER[grad.dtype], out.data_ptr())
    _scatter(*index_at(crow, col), *data, ids.shape[0], grad.shape[1])
    return out


def spmm(values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    values, crow, col, x = plain(values), plain(crow), plain(col), operand(x)
    (batch, cols), rows = x.shape, crow.shape[0] - 1
    y = x.new_empty(batch, rows)
    data = (values.data_ptr(), NUMBER[x.dtype], x.data_ptr(), y.data_ptr())
    _spmm(*index_at(crow, col), *data, batch, rows, cols)
    return y


def spmm_t(values: Tensor, crow: Tensor, col: Tensor | None, dy: Tensor, n_cols: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    values, crow, col, dy = plain(values), plain(crow), plain(col), operand(dy)
    dx = dy.new_zeros(dy.shape[0], n_cols)
    data = (values.data_ptr(), NUMBER[dy.dtype], dy.data_ptr(), dx.data_ptr())
    _spmm_t(*index_at(crow, col), *data, *dy.shape, n_cols)
    return dx


def sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    crow, col, dy, x = plain(crow), plain(col), operand(dy), operand(x)
    out = x.new_zeros(nnz)
    data = (dy.data_ptr(), NUMBER[x.dtype], x.data_ptr(), out.data_ptr())
    _sddmm(*index_at(crow, col), *data, *dy.shape, x.shape[1])
    return out


def _numbers(ids: Tensor) -> Tensor:
    """`operand` for integers, whose signs are in their place."""
    return ids if ids.is_cpu and ids.is_contiguous() else operand(ids)


# ---------------------------------------------------------------- kernels: a row has words in a bitmap, none in CSR


@device_function
def _row(index, kind, words, col, col_kind, row, columns):
    """Where the values of a row begin, and how many there are; their columns are written to ``columns``."""
    n = 0
    if words:
        begin = np.int64(peek(index, row * words, kind))
        for w in range(1, words):
            m = np.uint32(peek(index, row * words + w, kind))
            while m:
                columns[n] = 32 * (w - 1) + lowest(m)
                m &= m - np.uint32(1)
                n += 1
    else:
        begin = np.int64(peek(index, row, kind))
        n = np.int64(peek(index, row + 1, kind)) - begin
        for i in range(n):
            columns[i] = peek(col, begin + i, col_kind)
    return begin, n


@serial_kernel
def _range(ids, kind, n):
    low = high = peek(ids, 0, kind)
    for e in range(1, n):
        i = peek(ids, e, kind)
        low, high = min(low, i), max(high, i)
    return low, high


@serial_kernel
def _gather(index, kind, words, col, col_kind, values, zero, ids, id_kind, out, n, d):
    columns = np.empty(d, np.int32)
    for e in range(n):
        for j in range(e * d, e * d + d):
            poke(out, j, zero)
        row = np.int64(peek(ids, e, id_kind))
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for i in range(stored):
            poke(out, e * d + columns[i], peek(values, begin + i, zero))


@serial_kernel
def _scatter(index, kind, words, col, col_kind, ids, id_kind, grad, zero, out, n, d):
    columns = np.empty(d, np.int32)
    for e in range(n):
        row = np.int64(peek(ids, e, id_kind))
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for k in range(stored):
            added = peek(out, begin + k, zero) + peek(grad, e * d + columns[k], zero)
            poke(out, begin + k, added)


@serial_kernel
def _spmm(index, kind, words, col, col_kind, values, zero, x, y, batch, rows, cols):
    columns = np.empty(cols, np.int32)
    for row in range(rows):
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for e in range(batch):
            s = zero
            for i in range(stored):
                s += peek(values, begin + i, zero) * peek(x, e * cols + columns[i], zero)
            poke(y, e * rows + row, s)


@serial_kernel
def _spmm_t(index, kind, words, col, col_kind, values, zero, dy, dx, batch, rows, cols):
    columns = np.empty(cols, np.int32)
    for row in range(rows):
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for e in range(batch):
            g = peek(dy, e * rows + row, zero)
            for i in range(stored):
                j = e * cols + columns[i]
                poke(dx, j, peek(dx, j, zero) + peek(values, begin + i, zero) * g)


@serial_kernel
def _sddmm(index, kind, words, col, col_kind, dy, zero, x, out, batch, rows, cols):
    columns = np.empty(cols, np.int32)
    for row in range(rows):
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for e in range(batch):
            g = peek(dy, e * rows + row, zero)
            for k in range(stored):
                added = peek(out, begin + k, zero) + g * peek(x, e * cols + columns[k], zero)
                poke(out, begin + k, added)
