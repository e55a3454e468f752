"""Finished runs whose models give another one its initial weights."""

from __future__ import annotations

import numpy as np

from recsys.data import Dataset
from recsys.errors import ConfigError
from recsys.models.base import Recommender
from recsys.recommender import SavedRecommender

__all__ = ["load_parts"]


def load_parts(folders: dict[str, str], dataset: Dataset) -> dict[str, Recommender]:
    """The models of finished runs on this data set.

    Raises:
        RecsysError: a folder holds no saved recommender, or one for other users or items, or one that was trained on
            interactions that this data set holds out.
    """
    parts = {}
    for name, folder in folders.items():
        saved = SavedRecommender.load(folder)
        for what, theirs, ours in (
            ("users", saved.user_ids, dataset.user_ids),
            ("items", saved.item_ids, dataset.item_ids),
        ):
            if not np.array_equal(theirs, ours):
                raise ConfigError(
                    f"train.pretrained.{name}: {folder} was trained for other {what} ({len(theirs)}) than those of "
                    f"{dataset.name} ({len(ours)}); train it on the same data"
                )
        outside = saved.history.nnz - saved.history.multiply(dataset.train).nnz
        if outside:
            raise ConfigError(
                f"train.pretrained.{name}: {folder} was trained on {outside} interactions that are not in this "
                "run's training part, but may be in its validation or test; train it on the same split (data.seed, "
                "data.options)"
            )
        parts[name] = saved.model
    return parts
