"""A bitmap's columns written out, for a call in which many entries ask for its rows.

With AVX2 sums of rows that are not crowded take longer from a bitmap than from columns (results/encodings-zen3.md),
though tables are bitmaps for the sake of other operations. Where a table's rows are asked for about as often as there
are rows, as in scores of pairs with many negatives, its columns are listed first, which takes a small part of the time
that it saves.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.jit import array, kernel, share_out, threads
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.simd import at, bits64, count, lowest, positions, put
from sparsecore.encoding import has_permute

__all__ = ["by_columns"]

_MOST_COLUMNS = 1 << 15  # of an int16
_MOST_ROWS = 2  # to an entry
_CROWDED = 0.4  # density from which bitmaps are as fast


def by_columns(
    crow: Tensor, col: Tensor | None, n_cols: int, nnz: int, entries: int
) -> tuple[Tensor, Tensor | None]:
    """The index set as it is, or, where these entries are served faster, as row pointers and columns: in scratch, until
    this thread's next call.
    """
    rows = crow.shape[0] - 1
    if col is not None or not has_permute() or n_cols > _MOST_COLUMNS:
        return crow, col
    if rows > _MOST_ROWS * entries or nnz >= _CROWDED * rows * n_cols:
        return crow, col
    pointers = workspace("listed rows", 1, rows + 1, torch.int32)[0, : rows + 1]
    columns = workspace("listed columns", 1, nnz + 64, torch.int16)[0]
    _list(array(crow), n_cols, pointers, columns.view(np.uint16), threads(rows * n_cols))
    return torch.from_numpy(pointers), torch.from_numpy(columns[:nnz])


@kernel
def _list(index, cols, pointers, columns, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    rows, words = index.shape[0] - 1, index.shape[1]
    flat, groups = index.reshape(-1), (cols + 63) // 64
    # The last 64 bits of a row may reach into the next row's pointer.
    tail = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(groups * 64 - cols)
    first, last = rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks
    end = np.int64(at(flat, last * words))
    for row in range(first, last):
        k = np.int64(at(flat, row * words))
        put(pointers, row, np.int32(k))
        # Up to 64 numbers more than there are would be written: to another thread's, near the end.
        freely = np.int64(at(flat, (row + 1) * words)) + 64 <= end
        for group in range(groups):
            mask = bits64(flat, row * words + 1 + 2 * group)
            if group == groups - 1:
                mask &= tail
            if freely:
                positions(columns, k, mask, group * 64)
                k += count(mask)
            else:
                while mask != 0:
                    put(columns, k, np.uint16(group * 64 + lowest(mask)))
                    mask &= mask - np.uint64(1)
                    k += 1
    if chunk == n_chunks - 1:
        put(pointers, rows, np.int32(end))
