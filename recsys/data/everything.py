"""All interactions of a data set to train on: for a model that is to serve, once there is nothing left to measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from recsys.data.dataset import Dataset, EvalSet, binary_csr
from recsys.data.split import transductive_dataset
from recsys.data.validation import with_validation
from recsys.errors import DataError

__all__ = ["everything"]


def everything(dataset: Dataset) -> Dataset:
    """The same interactions, all of them in train; nobody in validation and test has a target.

    Users of train stay in their rows; held-out ones follow with their whole histories, first those of validation. The
    order of histories is kept only where targets come last, as by leave-one-out.

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
    nobody = np.empty(0, dtype=np.int64)
    nothing, _ = binary_csr(nobody, nobody, train.shape)
    whole = transductive_dataset(
        dataset.name, train, nothing, nothing, np.concatenate(ids), dataset.item_ids, order=order
    )
    note = "trained on everything: validation and test put into train"
    return replace(whole, notes=(*dataset.notes, note))


def _on_rows(part: EvalSet, known: NDArray[np.bool_], shape: tuple[int, int]) -> csr_array:
    """The targets of users of train as a matrix of the shape of train."""
    targets = part.targets[known].tocoo()
    return binary_csr(part.users[known][targets.coords[0]], targets.coords[1], shape)[0]
