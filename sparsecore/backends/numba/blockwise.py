"""Products through torch's dense ones, a block of rows of W at a time: for dense weights and large batches.

The scratch block is bounded; W is never expanded as a whole.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from numba.extending import overload

from sparsecore.backends.numba.jit import kernel
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.simd import (
    at,
    bits,
    compress,
    count,
    expand,
    first_lanes,
    load_masked,
    put,
    store,
    store_masked,
)

_ROWS = 1024
_POSITIONS = 1 << 22  # of a block: fewer rows where they are longer


def _blocks(rows: int, cols: int):
    height = max(1, min(_ROWS, _POSITIONS // cols))
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def _scratch(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(workspace("block", 1, rows * cols, dtype)[0, : rows * cols]).view(rows, cols)


def spmm(values, crow, col, x, y, n_chunks):
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    rows, cols = y.shape[1], x.shape[1]
    blocks = _blocks(rows, cols)
    scratch = _scratch(blocks[0][1], cols, x.dtype)
    for first, last in blocks:
        block = scratch[: last - first]
        _spread(values, crow, col, first, block.numpy(), n_chunks)
        torch.mm(x, block.t(), out=y[:, first:last])


def spmm_t(values, crow, col, dy, dx, n_chunks):
    dy, dx = torch.from_numpy(dy), torch.from_numpy(dx)
    rows, cols = dy.shape[1], dx.shape[1]
    blocks = _blocks(rows, cols)
    scratch = _scratch(blocks[0][1], cols, dy.dtype)
    for first, last in blocks:
        block = scratch[: last - first]
        _spread(values, crow, col, first, block.numpy(), n_chunks)
        if first == 0:
            torch.mm(dy[:, first:last], block, out=dx)
        else:
            dx.addmm_(dy[:, first:last], block)


def sddmm(crow, col, dy, x, out, n_chunks):
    dy, x = torch.from_numpy(dy), torch.from_numpy(x)
    rows, cols = dy.shape[1], x.shape[1]
    blocks = _blocks(rows, cols)
    scratch = _scratch(blocks[0][1], cols, x.dtype)
    for first, last in blocks:
        block = scratch[: last - first]
        torch.mm(dy[:, first:last].t(), x, out=block)
        _collect(crow, col, first, block.numpy(), out, n_chunks)


@kernel
def _spread(values, crow, col, first, block, n_chunks):
    rows, cols = block.shape
    out = block.reshape(-1)
    for chunk in prange(n_chunks):
        for i in range(rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks):
            spread_row(values, crow, col, first + i, cols, out, i * cols)


@kernel
def _collect(crow, col, first, block, out, n_chunks):
    rows, cols = block.shape
    source = block.reshape(-1)
    for chunk in prange(n_chunks):
        for i in range(rows * chunk // n_chunks, rows * (chunk + 1) // n_chunks):
            collect_row(crow, col, first + i, cols, source, i * cols, out)


def spread_row(values, crow, col, row, cols, out, place):
    """A row of W, with its zeros, to ``out[place : place + cols]``."""
    raise NotImplementedError


def collect_row(crow, col, row, cols, source, place, out):
    """The numbers of ``source[place : place + cols]`` at a row's nonzeros to their places in ``out``."""
    raise NotImplementedError


@overload(spread_row)
def _spread_row(values, crow, col, row, cols, out, place):
    def bitmap(values, crow, col, row, cols, out, place):
        masks = crow.view(np.uint16).reshape(-1)
        word = row * 2 * crow.shape[1] + 2
        k = np.intp(crow[row, 0])
        for j in range(0, cols // 16 * 16, 16):
            mask = bits(masks, word)
            store(out, place + j, expand(values, k, mask))
            k += count(mask)
            word += 1
        if cols % 16:
            store_masked(
                out, place + cols // 16 * 16, expand(values, k, bits(masks, word)), first_lanes(cols % 16)
            )

    def csr(values, crow, col, row, cols, out, place):
        out[place : place + cols] = 0
        for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
            put(out, place + np.intp(at(col, k)), at(values, k))

    return bitmap if crow.ndim == 2 else csr


@overload(collect_row)
def _collect_row(crow, col, row, cols, source, place, out):
    def bitmap(crow, col, row, cols, source, place, out):
        masks = crow.view(np.uint16).reshape(-1)
        word = row * 2 * crow.shape[1] + 2
        k = np.intp(crow[row, 0])
        for j in range(0, cols, 16):
            mask = bits(masks, word)
            v = load_masked(source, place + j, first_lanes(min(16, cols - j)))
            store_masked(out, k, compress(v, mask), first_lanes(count(mask)))
            k += count(mask)
            word += 1

    def csr(crow, col, row, cols, source, place, out):
        for k in range(np.intp(crow[row]), np.intp(crow[row + 1])):
            put(out, k, at(source, place + np.intp(at(col, k))))

    return bitmap if crow.ndim == 2 else csr
