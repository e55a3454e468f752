"""What a dataset looks like: sizes, how active users are, how unevenly items are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import Dataset

__all__ = ["QUANTILES", "gini", "statistics"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def gini(counts: NDArray[Any]) -> float:
    """Gini coefficient of counts x_1 <= ... <= x_n: sum_i (2 i - n - 1) x_i / (n sum_i x_i).

    0 if all are equal, close to 1 if one has everything; 0 as well where there is nothing to share.
    """
    ascending = np.sort(counts).astype(np.float64)
    n, total = len(ascending), float(ascending.sum())
    if total == 0.0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * total))


def statistics(dataset: Dataset) -> dict[str, Any]:
    """`Dataset.summary` and, of the training matrix, quantiles of the interactions of a user and of an item (rows and
    columns without any included) and the Gini coefficient of the items' popularity, ready for JSON.
    """
    of_user = np.diff(dataset.train.indptr)
    of_item = np.bincount(dataset.train.indices, minlength=dataset.n_items)

    def quantiles(counts: NDArray[Any]) -> dict[str, float]:
        return {f"{q:g}": float(np.quantile(counts, q)) for q in QUANTILES}

    return {
        **dataset.summary(),
        "order_known": dataset.order is not None,
        "interactions_per_user": quantiles(of_user),
        "interactions_per_item": quantiles(of_item),
        "gini_of_popularity": gini(of_item),
    }
