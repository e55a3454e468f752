"""Some rows of a weight turned column-major, in scratch: the values of each column, and the rows that they are from.

From a bitmap, blocks of 16 x 16 are turned in registers; from CSR, at low density, and where there is no AVX-512, every
value goes its own way, after the columns were counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba.extending import overload

from sparsecore.backends.numba.jit import device_function
from sparsecore.backends.numba.memory import TYPES, workspace
from sparsecore.backends.numba.panels import index_space, localise, pointer
from sparsecore.backends.numba.simd import LANES, at, copy, has_avx512, put
from sparsecore.backends.numba.simd_turn import turn_block

__all__ = ["CROWDED", "MOST_COLUMNS", "Turned", "turn", "turned"]

MOST_COLUMNS = 1 << 16  # a column is a uint16
CROWDED = 0.2  # density from which blocks are turned in registers


class Turned(NamedTuple):
    """Scratch of `turn`, a row for each chunk."""

    values: np.ndarray
    rows: np.ndarray
    ends: np.ndarray
    local: np.ndarray
    segment: np.ndarray
    listed: np.ndarray
    listed_rows: np.ndarray


def turned(n_chunks: int, height: int, cols: int, dtype: np.dtype) -> Turned:
    """Room for ``height`` rows of ``cols`` columns."""
    listed = LANES * (height + LANES)
    return Turned(
        workspace("turned", n_chunks, height * cols + LANES, TYPES[dtype]),
        workspace("turned rows", n_chunks, height * cols + LANES, torch.int16).view(np.uint16),
        workspace("turned ends", n_chunks, cols + 1, torch.int32),
        *index_space(n_chunks, height, cols, MOST_COLUMNS),
        workspace("listed", n_chunks, listed, TYPES[dtype]),
        workspace("listed rows", n_chunks, listed, torch.int16).view(np.uint16),
    )


@device_function
def turn(
    values, crow, col, first, last, cols, height, turned, rows, ends, local, segment, listed, listed_rows
):
    """Rows first .. last: column j's values are ``turned[ends[j - 1] : ends[j]]`` (from 0 for the first), those of the
    rows ``first + rows[ends[j - 1] : ends[j]]``, which ascend.
    """
    if not _turn_blocks(
        values, crow, first, last, cols, height, turned, rows, ends, segment, listed, listed_rows
    ):
        localise(crow, col, first, last, cols, MOST_COLUMNS, height, local, segment)
        start = pointer(crow, first)
        ends[:] = 0
        for k in range(pointer(crow, last) - start):
            j = np.intp(at(local, k)) + 1
            put(ends, j, np.int32(at(ends, j) + 1))
        for j in range(1, cols + 1):
            ends[j] += ends[j - 1]
        for i in range(last - first):
            for k in range(np.intp(at(segment, i)), np.intp(at(segment, height + i))):
                j = np.intp(at(local, k))
                place = np.intp(at(ends, j))
                put(ends, j, np.int32(place + 1))
                put(turned, place, at(values, start + k))
                put(rows, place, np.uint16(i))


def _turn_blocks(values, crow, first, last, cols, height, turned, rows, ends, segment, listed, listed_rows):
    """Turn the rows and return True, if blocks of 16 fit: into them, and their vectors into the values."""
    raise NotImplementedError


@overload(_turn_blocks)
def _turned_blocks(values, crow, first, last, cols, height, turned, rows, ends, segment, listed, listed_rows):
    if crow.ndim == 1 or values.dtype.bitwidth != 32 or not has_avx512():
        return (
            lambda values, crow, first, last, cols, height, turned, rows, ends, segment, listed, listed_rows: (
                False
            )
        )

    def blocks(values, crow, first, last, cols, height, turned, rows, ends, segment, listed, listed_rows):
        n, stored = last - first, len(values)
        # At low density a block costs more than its values do one by one.
        if n % 16 or pointer(crow, last) + 16 > stored or stored < CROWDED * cols * (crow.shape[0] - 1):
            return False
        masks, step = crow.view(np.uint16).reshape(-1), 2 * crow.shape[1]
        # Lists of 16 columns, each with room for all rows and a vector more, and then one after the other.
        reached, list_ends, stride = segment, segment[height:], height + LANES
        for i in range(n):
            put(reached, i, np.int32(pointer(crow, first + i) - pointer(crow, first)))
        end, start = 0, pointer(crow, first)
        for j in range(0, cols, 16):
            for c in range(16):
                put(list_ends, c, np.int32(c * stride))
            for i in range(0, n, 16):
                place = (first + i) * step + 2 + j // 16
                turn_block(values, start, reached, i, masks, place, step, listed, listed_rows, list_ends, i)
            for c in range(min(16, cols - j)):
                length = np.intp(at(list_ends, c)) - c * stride
                for k in range(0, length, 16):
                    copy(listed, c * stride + k, turned, end + k)
                    copy(listed_rows, c * stride + k, rows, end + k)
                end += length
                put(ends, j + c, np.int32(end))
        return True

    return blocks
