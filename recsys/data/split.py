"""Ways to divide interactions into train, validation and test.

"ratio" divides each user's interactions (weak generalisation: every user is trained on). "heldout" divides
the users: those held out are never trained on, and are evaluated by showing part of their history, the
fold-in, and asking for the rest (strong generalisation; Liang et al., Variational Autoencoders for
Collaborative Filtering, WWW 2018). "loo" and "temporal" follow the order of the interactions: see
`recsys.data.order_split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.csr import entry_rows, find_pairs, rank_in_rows
from recsys.data.dataset import Dataset, EvalSet, Oracle, binary_csr
from recsys.data.order_split import last_of_each, loo_split, temporal_split
from recsys.data.spelling import spelled
from recsys.errors import ConfigError, DataError

__all__ = [
    "SplitOptions",
    "carve_validation",
    "heldout_dataset",
    "heldout_split",
    "leave_one_out_at_random",
    "order_of_part",
    "ratio_split",
    "split_dataset",
    "transductive_dataset",
]

KINDS = ("ratio", "heldout", "loo", "temporal")


@dataclass(frozen=True)
class SplitOptions:
    """How `split_dataset` divides a matrix.

    Attributes:
        kind: "ratio" (each user's interactions, at random), "heldout" (the users), "loo" (each user's last one) or
            "temporal" (all interactions, by time).
        validation: fraction of the interactions of each user, of the users, or of all interactions. "loo" asks only
            whether it is 0: then there is no validation set.
        test: as `validation`.
        fold_in: fraction of a held-out user's history that is shown to the model ("heldout" only).

    Raises:
        ConfigError: a fraction is out of range, or nothing is left to train on.
    """

    kind: Literal["ratio", "heldout", "loo", "temporal"] = "ratio"
    validation: float = 0.1
    test: float = 0.1
    fold_in: float = 0.8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"split: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        for what, value in (("validation", self.validation), ("test", self.test), ("fold_in", self.fold_in)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{what}: expected a fraction, got {value!r}")
        if self.kind == "loo":
            return
        for what, value in (("validation", self.validation), ("test", self.test)):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{what}: expected a fraction in [0, 1), got {value}")
        if self.validation + self.test >= 1.0:
            raise ConfigError(
                f"validation {self.validation} + test {self.test} leave nothing to train on; "
                "their sum must be below 1"
            )
        if not 0.0 < self.fold_in < 1.0:
            raise ConfigError(f"fold_in: expected a fraction in (0, 1), got {self.fold_in}")


def _partition(matrix: csr_array, sizes: Sequence[NDArray[np.int64]], seed: int) -> list[csr_array]:
    """Divide each row at random: parts of sizes[0][u], sizes[1][u], ... entries, and last what remains."""
    rows = entry_rows(matrix)
    # Entries in random order within their row; `place` is the position of an entry in that order.
    order = np.lexsort((np.random.default_rng(seed).random(matrix.nnz), rows))
    place = np.empty(matrix.nnz, dtype=np.int64)
    place[order] = np.arange(matrix.nnz) - matrix.indptr[rows]
    part = np.full(matrix.nnz, len(sizes), dtype=np.int8)
    bound = np.cumsum(np.stack(sizes), axis=0)
    for index in reversed(range(len(sizes))):
        part[place < bound[index][rows]] = index
    return [
        binary_csr(rows[part == index], matrix.indices[part == index], matrix.shape)[0]
        for index in range(len(sizes) + 1)
    ]


def _share(lengths: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Rounded fraction of each length, at least 1, or 0 everywhere if the fraction is 0."""
    if fraction == 0.0:
        return np.zeros_like(lengths)
    return np.maximum(1, np.rint(lengths * fraction)).astype(np.int64)


def ratio_split(
    matrix: csr_array, validation: float = 0.1, test: float = 0.1, seed: int = 0
) -> tuple[csr_array, csr_array, csr_array]:
    """Divide each user's interactions at random into train, validation and test of the same shape.

    A part with a fraction above 0 gets at least one interaction, and train always keeps one. Users with fewer
    than 3 interactions stay wholly in train.
    """
    lengths = np.diff(matrix.indptr).astype(np.int64)
    n_validation = _share(lengths, validation)
    n_test = np.minimum(_share(lengths, test), np.maximum(lengths - 1 - np.minimum(n_validation, 1), 0))
    n_validation = np.minimum(n_validation, np.maximum(lengths - 1 - n_test, 0))
    n_validation[lengths < 3] = 0
    n_test[lengths < 3] = 0
    test_part, validation_part, train = _partition(matrix, (n_test, n_validation), seed)
    return train, validation_part, test_part


def carve_validation(train: csr_array, fraction: float = 0.1, seed: int = 0) -> tuple[csr_array, csr_array]:
    """Take a validation part out of a published train matrix, as its test part must not choose the model.

    Returns the rest and the part taken. Users as in `ratio_split`: at least one interaction is taken and one
    kept, and users with fewer than 3 are left alone.
    """
    rest, validation, _ = ratio_split(train, validation=fraction, test=0.0, seed=seed)
    return rest, validation


def leave_one_out_at_random(train: csr_array, seed: int = 0) -> tuple[csr_array, csr_array]:
    """(rest, one): a random item of each user on its own, of the users with at least two."""
    key = np.random.default_rng(seed).permutation(train.nnz)
    return last_of_each(train, rank_in_rows(train, key))


def transductive_dataset(
    name: str,
    train: csr_array,
    validation: csr_array,
    test: csr_array,
    user_ids: NDArray[Any],
    item_ids: NDArray[Any],
    oracle: Oracle | None = None,
    notes: Sequence[str] = (),
    order: NDArray[np.int64] | None = None,
    candidates: NDArray[np.int64] | None = None,
    targets_last: bool = False,
    later: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> Dataset:
    """Dataset whose evaluation users are its training users.

    A user's inputs are what is known by then: the train row for validation, train and validation for test. `order`
    is of the train pairs; `candidates` are the test set's. A note says how many users with targets have nothing to
    train on: parts that were given may have such.
    """
    users = np.arange(train.shape[0], dtype=np.int64)
    known = csr_array(train + validation)  # disjoint, or EvalSet refuses them below
    dataset = Dataset(
        name=name,
        train=train,
        validation=EvalSet(train, validation, users, user_ids),
        test=EvalSet(known, test, users, user_ids, candidates),
        user_ids=user_ids,
        item_ids=item_ids,
        order=order,
        targets_last=targets_last,
        later=later,
        oracle=oracle,
        notes=tuple(notes),
    )
    cold = tuple(
        f"{what}: {count} of {len(part.rows_with_targets)} users with targets have no interaction in train; they are "
        "ranked for and counted all the same"
        for what, part in (("validation", dataset.validation), ("test", dataset.test))
        if (count := dataset.without_train(part))
    )
    # A prepared data set brings its notes, perhaps this one among them.
    return replace(dataset, notes=tuple(dict.fromkeys(dataset.notes + cold))) if cold else dataset


def heldout_split(
    matrix: csr_array, validation: float = 0.1, test: float = 0.1, fold_in: float = 0.8, seed: int = 0
) -> tuple[
    NDArray[np.int64],
    tuple[NDArray[np.int64], csr_array, csr_array],
    tuple[NDArray[np.int64], csr_array, csr_array],
]:
    """Divide the users at random; divide the history of those held out into fold-in and targets.

    Only users with at least 2 interactions can be held out (one to show, one to ask for); the fractions are
    of those. Returns (train rows, (validation rows, inputs, targets), (test rows, inputs, targets)), where
    rows are ascending rows of `matrix`.
    """
    rng = np.random.default_rng(seed)
    lengths = np.diff(matrix.indptr).astype(np.int64)
    eligible = rng.permutation(np.flatnonzero(lengths >= 2))
    n_test, n_validation = (round(len(eligible) * fraction) for fraction in (test, validation))
    test_rows = np.sort(eligible[:n_test])
    validation_rows = np.sort(eligible[n_test : n_test + n_validation])
    train_rows = np.setdiff1d(np.arange(matrix.shape[0]), np.concatenate([test_rows, validation_rows]))

    def divide(rows: NDArray[np.int64], key: int) -> tuple[NDArray[np.int64], csr_array, csr_array]:
        n_targets = np.minimum(_share(lengths[rows], 1.0 - fold_in), lengths[rows] - 1)
        targets, inputs = _partition(csr_array(matrix[rows]), (n_targets,), key)
        return rows, inputs, targets

    keys = rng.integers(2**31, size=2)
    return train_rows, divide(validation_rows, int(keys[0])), divide(test_rows, int(keys[1]))


def heldout_dataset(
    name: str,
    train: csr_array,
    validation: tuple[csr_array, csr_array, NDArray[Any] | None],
    test: tuple[csr_array, csr_array, NDArray[Any] | None],
    user_ids: NDArray[Any],
    item_ids: NDArray[Any],
    oracle: Oracle | None = None,
    notes: Sequence[str] = (),
    order: NDArray[np.int64] | None = None,
) -> Dataset:
    """Dataset whose evaluation users were never trained on; each set is (inputs, targets, raw user ids)."""

    def heldout(inputs: csr_array, targets: csr_array, ids: NDArray[Any] | None) -> EvalSet:
        return EvalSet(inputs, targets, np.full(inputs.shape[0], -1, dtype=np.int64), ids)

    return Dataset(
        name=name,
        train=train,
        validation=heldout(*validation),
        test=heldout(*test),
        user_ids=user_ids,
        item_ids=item_ids,
        order=order,
        oracle=oracle,
        notes=tuple(notes),
    )


def order_of_part(
    matrix: csr_array, order: NDArray[np.int64] | None, part: csr_array
) -> NDArray[np.int64] | None:
    """Places in their user's history of the pairs of `part`, all of which are in `matrix`, numbered anew from 0."""
    return None if order is None else rank_in_rows(part, order[find_pairs(matrix, part)])


def split_dataset(
    name: str,
    matrix: csr_array,
    user_ids: NDArray[Any],
    item_ids: NDArray[Any],
    options: SplitOptions,
    seed: int = 0,
    oracle: Oracle | None = None,
    notes: Sequence[str] = (),
    order: NDArray[np.int64] | None = None,
    time: NDArray[np.float64] | None = None,
) -> Dataset:
    """Divide one binary matrix by `options` into a Dataset; the same seed gives the same split.

    `order` and `time` are (matrix.nnz,), as in `recsys.data.interactions.Interactions`.

    Raises:
        DataError: there is no interaction, or the split needs an order or timestamps that are not given.
    """
    if matrix.nnz == 0:
        raise DataError(f"{name}: no interaction in the data")
    later: tuple[NDArray[Any], NDArray[Any]] | None = None
    if options.kind == "heldout":
        rows, *sets = heldout_split(matrix, options.validation, options.test, options.fold_in, seed)
        validation, test = ((inputs, targets, user_ids[held]) for held, inputs, targets in sets)
        train = csr_array(matrix[rows])
        of_rows = np.isin(entry_rows(matrix), rows)
        kept = None if order is None else order[of_rows]
        return heldout_dataset(
            name, train, validation, test, user_ids[rows], item_ids, oracle, notes, order=kept
        )
    if options.kind == "temporal":
        if time is None:
            raise DataError(
                f"{name}: the split 'temporal' needs a timestamp of every interaction and there is none; "
                f"name the column: {spelled('timestamp_column')}; or take the split 'loo' with "
                f"{spelled('order', 'file')}, or 'ratio'"
            )
        *parts, users, items, whole, dropped = temporal_split(matrix, time, options.validation, options.test)
        if not whole.all():
            later = user_ids[entry_rows(matrix)[~whole]], item_ids[matrix.indices[~whole]]
        known = csr_array(csr_array(matrix[users])[:, items])
        if order is not None:
            order = rank_in_rows(known, order[whole])
        matrix, user_ids, item_ids, notes = known, user_ids[users], item_ids[items], (*notes, *dropped)
    elif options.kind == "loo":
        if order is None:
            raise DataError(
                f"{name}: the split 'loo' needs the order of each user's interactions and the data does not tell it; "
                f"take a table with timestamps, or {spelled('split', 'ratio')}"
            )
        parts = list(loo_split(matrix, order, options.validation > 0, options.test > 0))
    else:
        parts = list(ratio_split(matrix, options.validation, options.test, seed))
    kept = order_of_part(matrix, order, parts[0])
    return transductive_dataset(
        name,
        parts[0],
        parts[1],
        parts[2],
        user_ids,
        item_ids,
        oracle,
        notes,
        order=kept,
        targets_last=options.kind == "loo",
        later=later,
    )
