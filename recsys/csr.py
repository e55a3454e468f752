"""Rows, ranks and places of the entries of CSR matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

__all__ = ["entry_rows", "find_pairs", "rank_in_rows", "stable_argsort"]


def entry_rows(matrix: csr_array) -> NDArray[np.int64]:
    """(nnz,) int64 row of every entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def stable_argsort(keys: NDArray[Any], size: int) -> NDArray[Any]:
    """argsort(keys, kind="stable") of integers in 0..size-1 in linear time.

    scipy turns a matrix of one entry a row round by counting, and keeps the order of equal columns.
    """
    n = len(keys)
    pointers = np.arange(n + 1, dtype=np.int32 if n < 2**31 - 1 else np.int64)
    one_a_row = csr_array((np.empty(n, np.bool_), keys, pointers), shape=(n, size))
    return one_a_row.tocsc().indices


def rank_in_rows(matrix: csr_array, key: NDArray[Any]) -> NDArray[np.int64]:
    """(nnz,) rank of each entry among those of its row by `key`, from 0; `key` has no ties within a row."""
    rows = entry_rows(matrix)
    by_key = np.argsort(key, kind="stable")
    by_row = by_key[stable_argsort(rows[by_key], matrix.shape[0])]
    rank = np.empty(len(rows), dtype=np.int64)
    rank[by_row] = np.arange(len(rows)) - matrix.indptr[rows]  # rows ascend, by key or not
    return rank


def find_pairs(matrix: csr_array, part: csr_array) -> NDArray[np.int64]:
    """(part.nnz,) position among the entries of `matrix` of each entry of `part`; -1 where it has none."""
    wanted = entry_rows(part) * matrix.shape[1] + part.indices
    keys = entry_rows(matrix) * matrix.shape[1] + matrix.indices
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)
