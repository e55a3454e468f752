"""What training and evaluation are given: a training matrix and two sets of users to rank items for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from recsys.errors import DataError

__all__ = ["Dataset", "EvalSet", "Oracle", "binary_csr", "check_binary_csr"]


def binary_csr(rows: NDArray[Any], cols: NDArray[Any], shape: tuple[int, int]) -> tuple[csr_array, int]:
    """Build the 0/1 matrix of the pairs (rows[k], cols[k]); return it with the number of repeated pairs.

    The matrix is float32 CSR with sorted unique indices. Pairs that occur again are merged, and counted.
    Raises DataError if a row or column lies outside `shape`.
    """
    for what, ids, size in (("user", rows, shape[0]), ("item", cols, shape[1])):
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            raise DataError(f"{what} ids must lie in 0..{size - 1}; found {ids.min()}..{ids.max()}")
    matrix = csr_array(coo_array((np.ones(len(rows), np.float32), (rows, cols)), shape=shape))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix, len(rows) - matrix.nnz


def check_binary_csr(matrix: csr_array, what: str) -> None:
    """Raise DataError unless `matrix` is a float32 csr_array of ones with sorted unique indices in range."""
    if not isinstance(matrix, csr_array):
        raise DataError(f"{what}: expected a scipy.sparse.csr_array, got {type(matrix).__name__}")
    if matrix.dtype != np.float32:
        raise DataError(f"{what}: expected float32 values, got {matrix.dtype}")
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{what}: not a valid CSR matrix: {error}") from error
    if not np.all(matrix.data == 1.0):  # also refuses NaN and infinity
        raise DataError(f"{what}: every stored value must be 1, as an interaction is there or is not")
    ascending = np.diff(matrix.indices) > 0
    # The step from the last entry of one row to the first of the next may go down.
    ends = matrix.indptr[1:-1]
    ascending[ends[(ends > 0) & (ends < matrix.nnz)] - 1] = True
    if not ascending.all():
        raise DataError(f"{what}: the indices of each row must be sorted and unique; see binary_csr")


def _check_ids(ids: NDArray[Any], length: int, what: str) -> None:
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or (ids.dtype != np.int64 and ids.dtype.kind != "U"):
        raise DataError(f"{what}: expected a 1-D array of int64 or unicode strings, got {ids!r:.80}")
    if len(ids) != length:
        raise DataError(f"{what}: expected {length} ids, got {len(ids)}")
    repeated = length - len(np.unique(ids))
    if repeated:
        raise DataError(f"{what}: {repeated} ids occur more than once; a raw id must name one row or column")


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Users to rank items for, with what is known of them and what they are to be offered.

    Every array has one row per user, m in all. Users without targets may be present; evaluation skips them.

    Attributes:
        inputs: (m, n_items) history shown to the model. These items are excluded from the ranking.
        targets: (m, n_items) relevant items; no pair of theirs is in `inputs`.
        users: (m,) int64 row of the user in the training matrix, or -1 for a held-out user.
        user_ids: (m,) raw ids of the users, held-out ones included; None if the data has none.
        candidates: (m, C) int64 items that a published protocol ranks the target among, in place of the catalogue;
            None if there are none. Only sampled evaluation reads them.

    Raises:
        DataError: shapes disagree, a matrix is not a canonical binary CSR matrix, or targets meet inputs.
    """

    inputs: csr_array
    targets: csr_array
    users: NDArray[np.int64]
    user_ids: NDArray[Any] | None = None
    candidates: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        check_binary_csr(self.inputs, "EvalSet.inputs")
        check_binary_csr(self.targets, "EvalSet.targets")
        if self.inputs.shape != self.targets.shape:
            raise DataError(
                f"EvalSet: inputs {self.inputs.shape} and targets {self.targets.shape} must have one shape"
            )
        rows = self.inputs.shape[0]
        if self.users.shape != (rows,) or self.users.dtype != np.int64:
            raise DataError(
                f"EvalSet.users: expected int64 of shape ({rows},), "
                f"got {self.users.dtype} of shape {self.users.shape}"
            )
        if rows and self.users.min() < -1:
            raise DataError(f"EvalSet.users: expected a row, or -1 if held out; got {self.users.min()}")
        if self.user_ids is not None:
            _check_ids(self.user_ids, rows, "EvalSet.user_ids")
        if self.candidates is not None:
            given = self.candidates
            if given.ndim != 2 or len(given) != rows or given.dtype != np.int64:
                raise DataError(
                    f"EvalSet.candidates: expected int64 of shape ({rows}, C), got {given.dtype} of {given.shape}"
                )
            if given.size and (given.min() < 0 or given.max() >= self.inputs.shape[1]):
                raise DataError(f"EvalSet.candidates: expected items below {self.inputs.shape[1]}")
        common = self.inputs.multiply(self.targets).nnz
        if common:
            raise DataError(
                f"EvalSet: {common} pairs are both inputs and targets; "
                "take them out of one (a train and a test file must not share pairs)"
            )

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    @property
    def rows_with_targets(self) -> NDArray[np.int64]:
        """Rows that can be evaluated: those with at least one target, ascending."""
        return np.flatnonzero(np.diff(self.targets.indptr)).astype(np.int64)


Oracle = Callable[[EvalSet, NDArray[np.int64]], NDArray[np.float32]]
"""`oracle(eval_set, rows) -> (len(rows), n_items)`: scores whose order no model can beat on average."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training matrix with validation and test users.

    Attributes:
        name: what it was loaded as.
        train: (n_train_users, n_items) float32 CSR of ones. Rows may be empty.
        validation: users to choose a model by.
        test: users to report on.
        user_ids: (n_train_users,) raw ids of the training rows, int64 or unicode.
        item_ids: (n_items,) raw ids of the columns, int64 or unicode.
        order: (train.nnz,) int64 place of every interaction in its user's history, 0 the oldest; in the order of
            `train.indices`. None where the data does not tell.
        targets_last: whether every user's target of validation comes after train, and that of test after both.
        later: raw ids, of users and of items, of pairs that are in no part, for a part of them has no row or column:
            what a temporal split leaves out. None without such.
        oracle: best-possible scores (synthetic data only).
        notes: what a reader of the figures should know, such as merged duplicates.

    Raises:
        DataError: the parts do not agree, or there is no interaction to train on.
    """

    name: str
    train: csr_array
    validation: EvalSet
    test: EvalSet
    user_ids: NDArray[Any]
    item_ids: NDArray[Any]
    order: NDArray[np.int64] | None = None
    targets_last: bool = False
    later: tuple[NDArray[Any], NDArray[Any]] | None = None
    oracle: Oracle | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_binary_csr(self.train, f"{self.name}: train")
        if self.train.nnz == 0:
            raise DataError(f"{self.name}: no interaction left to train on")
        if self.order is not None and self.order.shape != (self.train.nnz,):
            raise DataError(
                f"{self.name}: order has shape {self.order.shape}, expected one place for each of the "
                f"{self.train.nnz} train interactions"
            )
        _check_ids(self.user_ids, self.n_users, f"{self.name}: user_ids")
        _check_ids(self.item_ids, self.n_items, f"{self.name}: item_ids")
        for what, part in (("validation", self.validation), ("test", self.test)):
            if part.inputs.shape[1] != self.n_items:
                raise DataError(
                    f"{self.name}: {what} has {part.inputs.shape[1]} items, train has {self.n_items}"
                )
            if len(part) and part.users.max() >= self.n_users:
                raise DataError(
                    f"{self.name}: {what} names training row {part.users.max()} of {self.n_users}"
                )

    @property
    def n_users(self) -> int:
        """Rows of the training matrix; held-out users are not among them."""
        return int(self.train.shape[0])

    @property
    def n_items(self) -> int:
        """Columns of every matrix."""
        return int(self.train.shape[1])

    @property
    def n_interactions(self) -> int:
        """Interactions in the training matrix."""
        return int(self.train.nnz)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any interaction of any part, and with the order of histories."""
        digest = hashlib.sha256()
        parts = [self.train]
        for users in (self.validation, self.test):
            parts += [users.inputs, users.targets]
        for matrix in parts:
            digest.update(str(matrix.shape).encode())
            digest.update(matrix.indptr.astype(np.int64).tobytes())
            digest.update(matrix.indices.astype(np.int64).tobytes())
        for users in (self.validation, self.test):
            digest.update(b"" if users.candidates is None else users.candidates.tobytes())
        digest.update(b"" if self.order is None else self.order.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def without_train(self, part: EvalSet) -> int:
        """How many users of validation or test have targets and a row in `train` that is empty.

        A model with a vector of each user knows nothing of them. They count in its means all the same, as in those of
        the authors of a published split.
        """
        users = part.users[part.rows_with_targets]
        return int(np.sum(np.diff(self.train.indptr)[users[users >= 0]] == 0))

    def expect(self, fingerprint: str | None, owner: str) -> None:
        """Raise DataError unless this is the data that `owner`, a run, was begun with.

        None, of a run that an older version has begun, says nothing.
        """
        if fingerprint not in (None, self.fingerprint):
            raise DataError(
                f"{self.name} is no longer the data that {owner} was begun with (split {fingerprint}, now "
                f"{self.fingerprint}): put the files back as they were, or say where they are (--data-dir); a run on "
                "the new data is another one (another --output, or --overwrite)"
            )

    def summary(self) -> dict[str, Any]:
        """Sizes and peculiarities, as plain values ready for JSON."""
        users, items = self.train.shape
        shown = sum(int(part.inputs[part.users < 0].nnz) for part in (self.validation, self.test))  # fold-in
        total = self.n_interactions + shown + int(self.validation.targets.nnz + self.test.targets.nnz)
        heldout = bool(np.any(self.validation.users < 0) or np.any(self.test.users < 0))
        return {
            "name": self.name,
            "users": self.n_users,
            "items": self.n_items,
            "interactions": total,
            "train_interactions": self.n_interactions,
            "train_density": self.n_interactions / (users * items),
            "empty_users": int(np.sum(np.diff(self.train.indptr) == 0)),
            "empty_items": int(np.sum(np.bincount(self.train.indices, minlength=items) == 0)),
            "validation_users": len(self.validation.rows_with_targets),
            "validation_targets": int(self.validation.targets.nnz),
            "test_users": len(self.test.rows_with_targets),
            "test_targets": int(self.test.targets.nnz),
            "evaluated_on": "held-out users" if heldout else "training users",
            "notes": list(self.notes),
        }
