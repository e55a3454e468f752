"""Calls so small that what surrounds a kernel costs more than its arithmetic.

To hand a kernel a tensor as a numpy array costs about a microsecond, and vectors, tiles and groups of equal ids pay
only where there is work for them. Here every operation is one serial kernel over single numbers that is handed
addresses: a tenth of a microsecond each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

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

# A number of each type, by which a kernel knows what lies at an address.
_OF = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.uint8: np.uint8(0),
    torch.int8: np.int8(0),
    torch.int16: np.int16(0),
    torch.int32: np.int32(0),
    torch.int64: np.int64(0),
}
_WORD = np.uint32(0)  # of a bitmap
_NO_COLUMN = np.uint8(0)
_FLOATING = (torch.float32, torch.float64)


def is_small_lookup(numbers: int, dtype: torch.dtype) -> bool:
    """Whether this many numbers of a table are few, and of a type that is computed with."""
    return numbers <= _MOST_NUMBERS and dtype in _FLOATING


def is_small_product(batch: int, nnz: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether a product of this many examples with a weight is small."""
    return (batch + 2) * nnz + rows <= _MOST_WORK and dtype in _FLOATING


def id_range(ids: Tensor) -> tuple[int, int]:
    """Smallest and largest of some ids on the CPU, at least one. They are in the cache when the lookup wants them."""
    ids = _plain(ids)
    return _range(ids.data_ptr(), _OF[ids.dtype], ids.numel())


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    values, crow, col, ids = _plain(values), _plain(crow), _plain(col), _numbers(ids)
    out = values.new_empty(ids.shape[0], n_cols)
    data = (values.data_ptr(), _OF[values.dtype], ids.data_ptr(), _OF[ids.dtype], out.data_ptr())
    _gather(*_index(crow, col), *data, ids.shape[0], n_cols)
    return out


def scatter_grad_(out: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor) -> Tensor:
    """``out[k] += sum of grad[e, col[k]]`` over the entries e whose id is the row of nonzero k."""
    crow, col, ids, grad = _plain(crow), _plain(col), _numbers(ids), operand(grad)
    data = (ids.data_ptr(), _OF[ids.dtype], grad.data_ptr(), _OF[grad.dtype], out.data_ptr())
    _scatter(*_index(crow, col), *data, ids.shape[0], grad.shape[1])
    return out


def spmm(values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    values, crow, col, x = _plain(values), _plain(crow), _plain(col), operand(x)
    (batch, cols), rows = x.shape, crow.shape[0] - 1
    y = x.new_empty(batch, rows)
    data = (values.data_ptr(), _OF[x.dtype], x.data_ptr(), y.data_ptr())
    _spmm(*_index(crow, col), *data, batch, rows, cols)
    return y


def spmm_t(values: Tensor, crow: Tensor, col: Tensor | None, dy: Tensor, n_cols: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    values, crow, col, dy = _plain(values), _plain(crow), _plain(col), operand(dy)
    dx = dy.new_zeros(dy.shape[0], n_cols)
    data = (values.data_ptr(), _OF[dy.dtype], dy.data_ptr(), dx.data_ptr())
    _spmm_t(*_index(crow, col), *data, *dy.shape, n_cols)
    return dx


def sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    crow, col, dy, x = _plain(crow), _plain(col), operand(dy), operand(x)
    out = x.new_zeros(nnz)
    data = (dy.data_ptr(), _OF[x.dtype], x.data_ptr(), out.data_ptr())
    _sddmm(*_index(crow, col), *data, *dy.shape, x.shape[1])
    return out


def _plain(tensor: Any) -> Any:
    """A part of a weight (or None) as kernels here read it. It must outlive its address's use."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _numbers(ids: Tensor) -> Tensor:
    """`operand` for integers, whose signs are in their place."""
    return ids if ids.is_cpu and ids.is_contiguous() else operand(ids)


def _index(crow: Tensor, col: Tensor | None) -> tuple[Any, ...]:
    """An index set as kernels here take it: address, type and words of a row; address and type of the columns."""
    if col is None:
        return crow.data_ptr(), _WORD, crow.shape[1], 0, _NO_COLUMN
    return crow.data_ptr(), _OF[crow.dtype], 0, col.data_ptr(), _OF[col.dtype]


# ---------------------------------------------------------------- kernels: a row has words in a bitmap, none in CSR


@intrinsic
def _peek(typing_context, address, index, like):
    """The number of the type of ``like`` that lies ``index`` numbers behind an address."""

    def emit(context, builder, signature, arguments):
        kind = context.get_value_type(like)
        place = builder.inttoptr(arguments[0], ir.PointerType(kind))
        return builder.load(builder.gep(place, [arguments[1]]), typ=kind)

    return like(types.int64, types.int64, like), emit


@intrinsic
def _poke(typing_context, address, index, number):
    """Write a number ``index`` numbers behind an address."""

    def emit(context, builder, signature, arguments):
        kind = context.get_value_type(number)
        place = builder.inttoptr(arguments[0], ir.PointerType(kind))
        builder.store(arguments[2], builder.gep(place, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, number), emit


@device_function
def _row(index, kind, words, col, col_kind, row, columns):
    """Where the values of a row begin, and how many there are; their columns are written to ``columns``."""
    n = 0
    if words:
        begin = np.int64(_peek(index, row * words, kind))
        for w in range(1, words):
            m = np.uint32(_peek(index, row * words + w, kind))
            while m:
                columns[n] = 32 * (w - 1) + lowest(m)
                m &= m - np.uint32(1)
                n += 1
    else:
        begin = np.int64(_peek(index, row, kind))
        n = np.int64(_peek(index, row + 1, kind)) - begin
        for i in range(n):
            columns[i] = _peek(col, begin + i, col_kind)
    return begin, n


@serial_kernel
def _range(ids, kind, n):
    low = high = _peek(ids, 0, kind)
    for e in range(1, n):
        i = _peek(ids, e, kind)
        low, high = min(low, i), max(high, i)
    return low, high


@serial_kernel
def _gather(index, kind, words, col, col_kind, values, zero, ids, id_kind, out, n, d):
    columns = np.empty(d, np.int32)
    for e in range(n):
        for j in range(e * d, e * d + d):
            _poke(out, j, zero)
        row = np.int64(_peek(ids, e, id_kind))
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for i in range(stored):
            _poke(out, e * d + columns[i], _peek(values, begin + i, zero))


@serial_kernel
def _scatter(index, kind, words, col, col_kind, ids, id_kind, grad, zero, out, n, d):
    columns = np.empty(d, np.int32)
    for e in range(n):
        row = np.int64(_peek(ids, e, id_kind))
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for k in range(stored):
            added = _peek(out, begin + k, zero) + _peek(grad, e * d + columns[k], zero)
            _poke(out, begin + k, added)


@serial_kernel
def _spmm(index, kind, words, col, col_kind, values, zero, x, y, batch, rows, cols):
    columns = np.empty(cols, np.int32)
    for row in range(rows):
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for e in range(batch):
            s = zero
            for i in range(stored):
                s += _peek(values, begin + i, zero) * _peek(x, e * cols + columns[i], zero)
            _poke(y, e * rows + row, s)


@serial_kernel
def _spmm_t(index, kind, words, col, col_kind, values, zero, dy, dx, batch, rows, cols):
    columns = np.empty(cols, np.int32)
    for row in range(rows):
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for e in range(batch):
            g = _peek(dy, e * rows + row, zero)
            for i in range(stored):
                j = e * cols + columns[i]
                _poke(dx, j, _peek(dx, j, zero) + _peek(values, begin + i, zero) * g)


@serial_kernel
def _sddmm(index, kind, words, col, col_kind, dy, zero, x, out, batch, rows, cols):
    columns = np.empty(cols, np.int32)
    for row in range(rows):
        begin, stored = _row(index, kind, words, col, col_kind, row, columns)
        for e in range(batch):
            g = _peek(dy, e * rows + row, zero)
            for k in range(stored):
                added = _peek(out, begin + k, zero) + g * _peek(x, e * cols + columns[k], zero)
                _poke(out, begin + k, added)
