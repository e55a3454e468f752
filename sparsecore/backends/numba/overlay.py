"""Numbers of stored positions, written over a block of rows."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sparsecore.backends.numba.index_set import IndexSet
from sparsecore.backends.numba.jit import array, kernel, share_out, threads
from sparsecore.backends.numba.simd import (
    at,
    bits,
    count,
    put,
    store_masked,
    unpack,
)
from sparsecore.ops.explore import Index

__all__ = ["overlay_"]


def overlay_(block: Tensor, values: Tensor, tensors: Index, rows: Tensor | slice) -> Tensor:
    """The block, with the numbers of its rows' stored positions in their places."""
    block = block.contiguous()
    index = IndexSet(tensors, (tensors[0].shape[0] - 1, block.shape[1]))
    ids = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else array(rows)
    _overlay(array(values.to(block.dtype)), ids, *index.arrays(), block.numpy(), threads(block.numel()))
    return block


@kernel
def _overlay(values, ids, pointers, col, masks, stride, block, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    rows, cols = block.shape
    flat = block.reshape(-1)
    for i in range(rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks):
        r, place = ids[i], i * cols
        k = np.int64(pointers[r])
        if col is not None:
            for n in range(k, np.int64(pointers[r + 1])):
                put(flat, place + np.int64(col[n]), at(values, n))
        if masks is not None:
            word = r * stride + 2
            for j in range(0, cols, 16):
                mask = bits(masks, word)
                n = count(mask)
                v = unpack(values, k, mask)
                store_masked(flat, place + j, v, mask)
                k += n
                word += 1
