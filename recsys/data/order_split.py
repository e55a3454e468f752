"""Splits that follow the order in which interactions happened.

Leave-one-out: of each user's history the last interaction is the test target and the one before it the validation
target. A user with two interactions gives one to test and none to validation; a user with one stays in train. Without
a test part, the last interaction is the validation target.

Temporal: two moments cut all interactions into train, validation and test, so that nothing of the future is learned.
Interactions of one moment are never parted: those at a cut belong to the later part. Users and items that have no
train interaction are left out, with their later interactions: no model that learns a row for each can rank them.
(`recsys.data.everything` trains on these, too.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.csr import entry_rows
from recsys.data.dataset import binary_csr
from recsys.errors import DataError

__all__ = ["last_of_each", "loo_split", "temporal_split"]


def _parts(
    matrix: csr_array, part: NDArray[np.int8], kept: NDArray[np.bool_] | None = None
) -> tuple[csr_array, csr_array, csr_array]:
    """Entries of `matrix` whose part is 0 (train), 1 (validation), 2 (test)."""
    rows, cols = entry_rows(matrix), matrix.indices
    chosen = [part == index for index in range(3)]
    if kept is not None:
        chosen = [one & kept for one in chosen]
    train, validation, test = (binary_csr(rows[one], cols[one], matrix.shape)[0] for one in chosen)
    return train, validation, test


def loo_split(
    matrix: csr_array, order: NDArray[np.int64], validation: bool = True, test: bool = True
) -> tuple[csr_array, csr_array, csr_array]:
    """Train, validation and test of the same shape by leave-one-out; see the module's docstring.

    order: (nnz,) place of each entry in its row's history, 0 the oldest.
    """
    lengths = np.diff(matrix.indptr)[entry_rows(matrix)]
    from_end = lengths - 1 - order
    part = np.zeros(matrix.nnz, dtype=np.int8)
    if test:
        part[(from_end == 0) & (lengths >= 2)] = 2
    if validation:  # the last one, too, where nothing is tested
        part[(from_end == int(test)) & (lengths >= 2 + int(test))] = 1
    return _parts(matrix, part)


def last_of_each(matrix: csr_array, order: NDArray[np.int64]) -> tuple[csr_array, csr_array]:
    """(rest, last): each row's last entry on its own, of the rows with at least two."""
    lengths = np.diff(matrix.indptr)[entry_rows(matrix)]
    part = ((order == lengths - 1) & (lengths >= 2)).astype(np.int8)
    rest, last, _ = _parts(matrix, part)
    return rest, last


def temporal_split(
    matrix: csr_array, time: NDArray[np.float64], validation: float = 0.1, test: float = 0.1
) -> tuple[
    csr_array, csr_array, csr_array, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], tuple[str, ...]
]:
    """Cut by time so that about the fraction `validation` and the last fraction `test` of all entries are held out.

    Returns (train, validation, test, rows, columns, kept, notes): the parts have the rows and columns of `matrix` that
    are kept, ascending; which of its entries are in a part; notes say what was left out.

    Raises:
        DataError: nothing is before the first cut (such as equal times everywhere), or nothing is left to test on.
    """
    n = matrix.nnz
    ascending = np.sort(time)
    part = np.zeros(n, dtype=np.int8)
    for index, share in ((1, validation + test), (2, test)):
        size = round(n * share)
        if size:
            part[time >= ascending[n - size]] = index
    rows, cols = entry_rows(matrix), matrix.indices
    train = part == 0
    if not train.any():
        raise DataError(
            f"no interaction is earlier than the first cut of the split 'temporal' (time {ascending[0]:g}): too many "
            "have one and the same timestamp"
        )
    known_user = np.bincount(rows[train], minlength=matrix.shape[0]) > 0
    known_item = np.bincount(cols[train], minlength=matrix.shape[1]) > 0
    kept = known_user[rows] & known_item[cols]
    users, items = np.flatnonzero(known_user), np.flatnonzero(known_item)
    parts = [csr_array(csr_array(one[users])[:, items]) for one in _parts(matrix, part, kept)]
    if test and not parts[2].nnz:
        raise DataError(
            "the split 'temporal' leaves nothing to test on: every later interaction is of a user or an item "
            "without an earlier one"
        )
    notes: tuple[str, ...] = ()
    if validation and not parts[1].nnz:
        notes = (
            "temporal split: no validation pair is left between the two cuts (equal timestamps, few pairs)",
        )
    if not kept.all():
        notes += (
            f"temporal split: {int((~kept).sum())} later pairs left out, of {int((~known_user).sum())} users and "
            f"{int((~known_item).sum())} items without a train pair",
        )
    return parts[0], parts[1], parts[2], users, items, kept, notes
