"""All interactions of a data set to train on: for a model that is to serve, once there is nothing left to measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from recsys.csr import entry_rows
from recsys.data.dataset import Dataset, EvalSet, binary_csr
from recsys.data.split import transductive_dataset
from recsys.data.validation import with_validation
from recsys.errors import DataError

__all__ = ["everything", "with_later"]


def everything(dataset: Dataset) -> Dataset:
    """The same interactions, all of them in train; nobody in validation and test has a target.

    Users of train stay in their rows; held-out ones follow with their whole histories, first those of validation. Users
    and items that only later pairs have, which a temporal split leaves out, follow in the order of their ids. The order
    of histories is kept only where targets come last, as by leave-one-out.

    Raises:
        DataError: held-out users without raw ids; a pair is in two parts.
    """
    train, order = dataset.train, dataset.order if dataset.targets_last else None
    ids: list[NDArray[Any]] = [dataset.user_ids]
    held: list[csr_array] = []
    for name, part in (("validation", dataset.validation), ("test", dataset.test)):
        known = part.users >= 0
        train, order = with_validation(train, _on_rows(part, known, train.shape), order)
        if known.all():
            continue
        if part.user_ids is None:
            raise DataError(
                f"{dataset.name}: the held-out users of {name} have no raw ids to be known by later"
            )
        held.append(csr_array(part.inputs[~known] + part.targets[~known]))
        ids.append(part.user_ids[~known])
    train = csr_array(vstack([train, *held], format="csr")) if held else train
    user_ids, item_ids = np.concatenate(ids), dataset.item_ids
    if dataset.later is not None:
        train, user_ids, item_ids = with_later(train, user_ids, item_ids, dataset.later)
        order = None
    nobody = np.empty(0, dtype=np.int64)
    nothing, _ = binary_csr(nobody, nobody, train.shape)
    whole = transductive_dataset(dataset.name, train, nothing, nothing, user_ids, item_ids, order=order)
    note = "trained on everything: validation and test put into train"
    return replace(whole, notes=(*dataset.notes, note))


def with_later(
    matrix: csr_array,
    user_ids: NDArray[Any],
    item_ids: NDArray[Any],
    later: tuple[NDArray[Any], NDArray[Any]],
) -> tuple[csr_array, NDArray[Any], NDArray[Any]]:
    """(matrix, user_ids, item_ids) with the pairs of `Dataset.later`; new users and items come last."""
    (users, user_ids), (items, item_ids) = map(_extended, (user_ids, item_ids), later)
    rows, cols = np.concatenate((entry_rows(matrix), users)), np.concatenate((matrix.indices, items))
    return binary_csr(rows, cols, (len(user_ids), len(item_ids)))[0], user_ids, item_ids


def _extended(known: NDArray[Any], later: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(places of the later ids, all ids): new ones after those that are known."""
    every = np.concatenate((known, np.setdiff1d(later, known)))
    ascending = np.argsort(every, kind="stable")
    return ascending[np.searchsorted(every[ascending], later)], every


def _on_rows(part: EvalSet, known: NDArray[np.bool_], shape: tuple[int, int]) -> csr_array:
    """The targets of users of train as a matrix of the shape of train."""
    targets = part.targets[known].tocoo()
    return binary_csr(part.users[known][targets.coords[0]], targets.coords[1], shape)[0]
