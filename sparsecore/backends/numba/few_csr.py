"""Products with a handful of examples, for a weight in CSR: one nonzero after the other.

``spmm_t`` for two to sixteen examples has vectors along the batch, whose features are packed 16 lanes wide: a nonzero
costs one load, one multiply-add and one store of a vector. Its results depend on the number of threads (each has its
own sums); those of ``sddmm`` do not.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.packing import own_panels, panels_of
from sparsecore.backends.numba.panel_spmm_t import add_and_unpack
from sparsecore.backends.numba.panels import split_rows
from sparsecore.backends.numba.simd import at, fma, load, put, splat, store

__all__ = ["sddmm", "spmm_t"]


def spmm_t(values, crow, col, dy, dx, n_chunks):
    batch, cols = dx.shape
    if batch == 1:
        sums = np.zeros((n_chunks, cols), dx.dtype)
        _add_one(values, crow, col, dy[0], sums, n_chunks)
        np.copyto(dx[0], sums[0])
        for part in range(1, n_chunks):
            dx += sums[part]
    else:
        sums = workspace("sums", n_chunks, 16 * cols, torch.from_numpy(dx).dtype)
        _add_rows(values, crow, col, dy, panels_of(dy, n_chunks), cols, sums, n_chunks)
        add_and_unpack(sums, dx, n_chunks)


def sddmm(crow, col, dy, x, out, n_chunks):
    """One example."""
    _outer_one(crow, col, dy[0], x[0], out, n_chunks)


@kernel
def _add_rows(values, crow, col, dy, panels, cols, sums, n_chunks, chunk):
    """sums[chunk, 16 * column + e] += value * dy[e, row]; the panel holds dy[:, row] from 16 * row on."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    panel = own_panels(dy, panels, n_chunks, chunk)
    total = sums[chunk]
    total[: 16 * cols] = 0
    for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
        y = load(panel, row * 16)
        for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
            j = np.intp(at(col, k)) * 16
            store(total, j, fma(splat(at(values, k)), y, load(total, j)))


@kernel
def _add_one(values, crow, col, dy, sums, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    total = sums[chunk]
    for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
        y = dy[row]
        for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
            j = np.intp(at(col, k))
            put(total, j, at(total, j) + at(values, k) * y)


@kernel
def _outer_one(crow, col, dy, x, out, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    for row in range(split_rows(crow, n_chunks, chunk), split_rows(crow, n_chunks, chunk + 1)):
        for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
            out[k] = dy[row] * at(x, np.intp(at(col, k)))
