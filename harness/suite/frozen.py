"""Reference kernels that no commit may change: what a time is held against.

Another process, another hour and another neighbour on the machine change all times together, but only as far as the
same part of the machine limits them. Therefore three references, for three limits: `products` (multiply-adds on
what caches hold), `rows` (reads of random rows that no cache holds) and `stream` (memory from end to end). Plain
loops, compiled by numba, one thread, inputs of a fixed seed: nothing of sparsecore is in them. A change here starts
every series of times anew: raise `VERSION`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["VERSION", "on_device", "products", "rows", "stream"]

VERSION = 2
_PAGE = 4096

Run = Callable[[], object]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _products(pointers, columns, values, x, out):  # type: ignore[no-untyped-def]
    batch = x.shape[1]
    for row in range(len(pointers) - 1):
        total = out[row]
        for b in range(batch):
            total[b] = 0.0
        for place in range(pointers[row], pointers[row + 1]):
            value, other = values[place], x[columns[place]]
            for b in range(batch):
                total[b] += value * other[b]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _rows(table, ids, out):  # type: ignore[no-untyped-def]
    for k in range(len(ids)):
        row = table[ids[k]]
        total = np.float32(0.0)
        for c in range(table.shape[1]):
            total += row[c]
        out[k] = total


@numba.njit(cache=True, fastmath=True, nogil=True)
def _stream(values, first, second, gradient):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        g = gradient[i]
        m = np.float32(0.9) * first[i] + np.float32(0.1) * g
        v = np.float32(0.999) * second[i] + np.float32(0.001) * g * g
        first[i], second[i] = m, v
        values[i] -= np.float32(1e-3) * m / (np.sqrt(v) + np.float32(1e-8))


def _placed(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """Copies that begin on a page. Where numpy happens to put an array, vectors may lie across two cache lines: the
    same kernel then takes up to 2.4 times as long, all through a process.
    """
    copies = []
    for array in arrays:
        buffer = np.empty(array.nbytes + _PAGE, np.uint8)
        start = -buffer.ctypes.data % _PAGE
        copies.append(buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape))
        copies[-1][...] = array
    return copies


def products(n_rows: int, n_cols: int, density: float, batch: int) -> Run:
    """W X of a random sparse W (n_rows, n_cols) and a dense X (n_cols, batch), float32."""
    rng = np.random.default_rng(0)
    each = max(1, round(density * n_cols))
    pointers = np.arange(n_rows + 1) * each
    columns = np.sort(rng.integers(0, n_cols, (n_rows, each), dtype=np.int32), axis=1).ravel()
    values = rng.standard_normal(n_rows * each, dtype=np.float32)
    x = rng.standard_normal((n_cols, batch), dtype=np.float32)
    operands = _placed(pointers, columns, values, x, np.empty((n_rows, batch), np.float32))
    return lambda: _products(*operands)


def rows(n_rows: int, n_cols: int, count: int) -> Run:
    """Sums of `count` random rows of a table (n_rows, n_cols) float32, other rows at each of 64 calls."""
    rng = np.random.default_rng(0)
    table, out = _placed(np.ones((n_rows, n_cols), np.float32), np.empty(count, np.float32))
    drawn = _placed(*(rng.integers(0, n_rows, count) for _ in range(64)))
    turn = iter(range(1 << 62))
    return lambda: _rows(table, drawn[next(turn) % 64], out)


def stream(size: int) -> Run:
    """One pass like Adam's over four arrays of `size` float32."""
    arrays = _placed(*(np.full(size, 1e-3, np.float32) for _ in range(4)))
    return lambda: _stream(*arrays)


def on_device(device: str) -> Run:
    """One pass over memory of a device: torch's own kernel, so that a series ends with another torch."""
    import torch

    values = torch.ones(1 << 24, device=device)
    return lambda: values.mul_(1.0)
