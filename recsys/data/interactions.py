"""All pairs of one file as a binary matrix that knows the order in which each user chose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.csr import entry_rows, rank_in_rows, stable_argsort
from recsys.data.dataset import binary_csr
from recsys.errors import DataError

__all__ = ["Interactions", "all_ids", "k_core", "merge_pairs", "renumbered", "select"]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Pairs with the raw ids of their rows and columns.

    Attributes:
        matrix: (n_users, n_items) float32 CSR of ones.
        user_ids, item_ids: raw ids, int64 or unicode.
        notes: what was merged, left out or numbered anew.
        order: (nnz,) int64 place of each pair in its user's history, 0 the oldest, in the order of
            `matrix.indices`; None where the file does not tell.
        time: (nnz,) float64 timestamps, likewise.
    """

    matrix: csr_array
    user_ids: NDArray[Any]
    item_ids: NDArray[Any]
    notes: tuple[str, ...] = ()
    order: NDArray[np.int64] | None = None
    time: NDArray[np.float64] | None = None


def merge_pairs(
    users: NDArray[Any], items: NDArray[Any], shape: tuple[int, int], time: NDArray[np.float64] | None = None
) -> tuple[csr_array, NDArray[np.int64], NDArray[np.float64] | None, int]:
    """The matrix of the pairs (users[k], items[k]), their order and time, and how many were repeated.

    Pairs follow one another by `time`, those of one time as they are given; without `time`, all as they are given.
    Of a pair that occurs again the first occurrence is kept.
    """
    if time is not None:
        history = np.argsort(time, kind="stable")
        users, items, time = users[history], items[history], time[history]
    by_item = stable_argsort(items, shape[1])
    by_pair = by_item[stable_argsort(users[by_item], shape[0])]
    del by_item
    rows, cols = users[by_pair], items[by_pair]
    first = np.ones(len(rows), dtype=bool)
    np.logical_or(rows[1:] != rows[:-1], cols[1:] != cols[:-1], out=first[1:])
    repeated = len(rows) - int(first.sum())
    if repeated:
        rows, cols, by_pair = rows[first], cols[first], by_pair[first]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    matrix = csr_array((np.ones(len(cols), np.float32), cols, indptr), shape=shape)
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    return matrix, rank_in_rows(matrix, by_pair), None if time is None else time[by_pair], repeated


def select(data: Interactions, entries: NDArray[np.bool_], note: str | None = None) -> Interactions:
    """The pairs where `entries`, (nnz,), is true, without the users and items that then have none."""
    rows, cols = entry_rows(data.matrix)[entries], data.matrix.indices[entries]
    users, row = np.unique(rows, return_inverse=True)
    items, col = np.unique(cols, return_inverse=True)
    matrix, _ = binary_csr(row, col, (len(users), len(items)))
    return replace(
        data,
        matrix=matrix,
        user_ids=data.user_ids[users],
        item_ids=data.item_ids[items],
        notes=data.notes + (() if note is None else (note,)),
        order=None if data.order is None else rank_in_rows(matrix, data.order[entries]),
        time=None if data.time is None else data.time[entries],
    )


def k_core(data: Interactions, min_user: int, min_item: int) -> Interactions:
    """Leave out users with fewer than `min_user` and items with fewer than `min_item` interactions, until stable.

    Raises:
        DataError: nothing is left.
    """
    rows, cols = entry_rows(data.matrix), data.matrix.indices
    kept = np.ones(len(rows), dtype=bool)
    before = -1
    while before != (before := int(kept.sum())):
        kept &= np.bincount(rows[kept], minlength=data.matrix.shape[0])[rows] >= min_user
        kept &= np.bincount(cols[kept], minlength=data.matrix.shape[1])[cols] >= min_item
    if not before:
        raise DataError(
            f"no interaction is left: no users have {min_user} and items {min_item} interactions; "
            "lower min_user or min_item"
        )
    if before == len(rows):
        return data
    note = f"{len(rows) - before} pairs left out: at least {min_user} a user and {min_item} an item"
    return select(data, kept, note)


def all_ids(ids: list[NDArray[Any]]) -> NDArray[Any]:
    """Distinct raw ids of several files, ascending; all as text where some are text."""
    if len({one.dtype.kind for one in ids}) > 1:
        ids = [one.astype(np.str_) for one in ids]
    return np.unique(np.concatenate(ids))


def renumbered(data: Interactions, user_ids: NDArray[Any], item_ids: NDArray[Any]) -> Interactions:
    """The same pairs among all users and items."""
    users = np.searchsorted(user_ids, data.user_ids.astype(user_ids.dtype))
    items = np.searchsorted(item_ids, data.item_ids.astype(item_ids.dtype))
    rows, cols = users[entry_rows(data.matrix)], items[data.matrix.indices]
    shape = len(user_ids), len(item_ids)
    matrix, _ = binary_csr(rows, cols, shape)
    # Numbers that become text change their order, and with it that of the entries.
    by_key = np.argsort(rows * len(item_ids) + cols, kind="stable")
    return replace(
        data,
        matrix=matrix,
        order=None if data.order is None else data.order[by_key],
        time=None if data.time is None else data.time[by_key],
    )
