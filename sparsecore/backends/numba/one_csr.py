"""``y = W x`` for one example, from CSR: eight nonzeros at a time, of operands that are handed over by address.

A small call takes less time than one whose operands become numpy arrays first, and where vectors are 8 wide this is
faster than `few_spmm`'s. Results do not depend on the number of threads. Limits were chosen on Zen 5.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.addresses import NUMBER, index_at, peek, plain, poke, split_at
from sparsecore.backends.numba.jit import kernel, operand, share_out
from sparsecore.backends.numba.lanes_rows import dot_of_row
from sparsecore.backends.numba.memory import result_of
from sparsecore.encoding import has_expand

__all__ = ["spmm", "suits"]

_MOST_NONZEROS = 65536  # up to here what surrounds the loop counts most
_LONG_ROW = 80  # nonzeros of a row, on average, from which the loop is no slower than vectors of AVX-512
_FLOATING = (torch.float32, torch.float64)


def suits(batch: int, nnz: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether this is the way to a product of so many examples with a weight in CSR."""
    if batch != 1 or dtype not in _FLOATING:
        return False
    return not has_expand() or nnz <= _MOST_NONZEROS or nnz >= _LONG_ROW * rows


def spmm(values: Tensor, crow: Tensor, col: Tensor, x: Tensor, n_chunks: int) -> Tensor:
    """``Y = X W^T``: X (1, cols) -> Y (1, rows)."""
    values, crow, col, x = plain(values), plain(crow), plain(col), operand(x)
    rows = crow.shape[0] - 1
    y = result_of(crow, "spmm", (1, rows), x.dtype)
    index, kind, _, columns, column = index_at(crow, col)
    zero = NUMBER[x.dtype]
    _dot_rows(
        index, kind, columns, column, values.data_ptr(), zero, x.data_ptr(), y.data_ptr(), rows, n_chunks
    )
    return y


@kernel
def _dot_rows(index, kind, columns, column, values, zero, x, y, rows, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    first, last = (
        split_at(index, kind, rows, n_chunks, chunk),
        split_at(index, kind, rows, n_chunks, chunk + 1),
    )
    begin, limit = np.int64(peek(index, first, kind)), np.int64(peek(index, rows, kind))
    for row in range(first, last):
        end = np.int64(peek(index, row + 1, kind))
        poke(y, row, dot_of_row(values, begin, end, limit, columns, column, x, zero))
        begin = end
