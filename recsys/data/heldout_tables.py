"""Held-out users in tables: train, {validation,test}_{tr,te} in one kind of file, as the code of MultVAE writes them.

Their columns are ``uid`` and ``sid``, users and items numbered through. Users of one part are in no other; in
validation and test, tr is what is shown of a user and te what is to be found.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from recsys.data.dataset import Dataset
from recsys.data.formats import SUFFIXES, read_interactions
from recsys.data.interactions import all_ids, renumbered
from recsys.data.options import ReadOptions
from recsys.data.split import heldout_dataset
from recsys.errors import DataError

__all__ = ["heldout_tables", "load_heldout_tables"]

PARTS = ("train", "validation_tr", "validation_te", "test_tr", "test_te")


def heldout_tables(folder: Path) -> dict[str, Path] | None:
    """The file of each part, all of one kind, or None."""
    for suffix in SUFFIXES:
        files = {part: folder / f"{part}{suffix}" for part in PARTS}
        if suffix != ".npz" and all(path.is_file() for path in files.values()):
            return files
    return None


def load_heldout_tables(name: str, files: dict[str, Path], read: ReadOptions) -> Dataset:
    """Users without targets are left out of validation and test.

    Raises:
        DataError: a file is damaged, or a user is in two of the parts.
    """
    parts = {part: read_interactions(path, read) for part, path in files.items()}
    item_ids = all_ids([part.item_ids for part in parts.values()])
    train = renumbered(parts["train"], parts["train"].user_ids, item_ids)
    sets, taken = [], {"train": train.user_ids.astype(np.str_)}
    for what in ("validation", "test"):
        pair = [parts[f"{what}_{which}"] for which in ("tr", "te")]
        user_ids = all_ids([part.user_ids for part in pair])
        for other, ids in taken.items():
            both = len(np.intersect1d(ids, user_ids.astype(np.str_)))
            if both:
                raise DataError(
                    f"{files[f'{what}_tr']}: expected users that are held out, but {both} of them are in {other}, too"
                )
        taken[what] = user_ids.astype(np.str_)
        inputs, targets = (renumbered(part, user_ids, item_ids).matrix for part in pair)
        rows = np.flatnonzero(np.diff(targets.indptr))
        sets.append((csr_array(inputs[rows]), csr_array(targets[rows]), user_ids[rows]))
    notes = tuple(note for part in parts.values() for note in part.notes)
    return heldout_dataset(
        name, train.matrix, sets[0], sets[1], train.user_ids, item_ids, notes=notes, order=train.order
    )
