"""What of the train pairs of a given split is kept for validation: some of them, none, or a part of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.csr import find_pairs
from recsys.data.order_split import last_of_each
from recsys.data.split import SplitOptions, carve_validation, leave_one_out_at_random
from recsys.errors import DataError

__all__ = ["validation_of", "with_validation"]


def with_validation(
    train: csr_array, validation: csr_array, order: NDArray[np.int64] | None = None
) -> tuple[csr_array, NDArray[np.int64] | None]:
    """(train and validation together, order of their pairs): for who trains on both.

    order: of the train pairs, if it is known and every user has one validation pair at most, which comes after them.

    Raises:
        DataError: a pair is in both.
    """
    whole = csr_array(train + validation)
    if whole.nnz != train.nnz + validation.nnz:
        raise DataError(f"{train.nnz + validation.nnz - whole.nnz} pairs are in both train and validation")
    whole.data[:] = 1.0
    if order is None:
        return whole, None
    lengths = np.diff(whole.indptr)
    places = np.repeat(lengths - 1, lengths)  # the last of its user, but for those of train
    places[find_pairs(whole, train)] = order
    return whole, places


def validation_of(
    train: csr_array,
    test: csr_array,
    order: NDArray[np.int64] | None,
    validation: float | None,
    seed: int,
) -> tuple[csr_array, csr_array, tuple[str, ...]]:
    """Divide train into (rest, validation, notes) where a split was published without a validation part.

    If no user has more than one test item (leave-one-out), one item of each user: the last of train if the order is
    known, else a random one. `validation` says otherwise: 0 none, a fraction below 1 that much of each user's items
    at random, 1 one item of each user. In other splits the default is 0.1.
    """
    one_each = int(np.diff(test.indptr).max(initial=0)) <= 1
    if validation is None:
        validation = 1 if one_each else 0.1
    if validation == 1 and not isinstance(validation, bool):
        if order is not None:
            rest, held = last_of_each(train, order)
            return rest, held, (f"validation: the last train item of each of {held.nnz} users",)
        rest, held = leave_one_out_at_random(train, seed)
        return rest, held, (f"validation: a random train item of each of {held.nnz} users, seed {seed}",)
    fraction = SplitOptions(validation=validation, test=0.0).validation
    rest, held = carve_validation(train, fraction, seed)
    if not fraction:
        return rest, held, ("validation: none",)
    return rest, held, (f"validation: {held.nnz} of {train.nnz} train pairs, seed {seed}",)
