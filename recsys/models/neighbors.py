"""The most similar items of every item, by how many users have chosen both."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

__all__ = ["ones", "top_neighbors"]

_PRODUCTS = 1 << 24  # of pairs of interactions that stand at a time while items are compared: 0.3 GB

Weigh = Callable[[NDArray[np.int64], NDArray[np.integer], NDArray[np.float64]], NDArray[np.float64]]


def top_neighbors(
    chosen: csr_array, count: int, weigh: Weigh
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The neighbors of each item with the largest weights.

    Args:
        chosen: R, (n_users, n_items), of ones (`ones`).
        count: neighbors of an item. One that has fewer is its own neighbor again, with weight 0.
        weigh: ``weigh(items, others, together)`` gives the weights of pairs of items that ``together`` > 0 users have
            chosen both of, entries of R^T R; a pair of weight 0 are no neighbors.

    Returns:
        (n_items, count) int64 items and (n_items, count) float64 weights, the largest first, the smaller item first of
        equal ones.
    """
    n_items = chosen.shape[1]
    by_item = chosen.T.tocsr()
    neighbors = np.repeat(np.arange(n_items), count).reshape(n_items, count)
    weights = np.zeros((n_items, count))
    if count == 0:
        return neighbors, weights
    # How many products the rows of R^T R up to each take; rows are made a block at a time.
    made = np.cumsum(np.asarray(chosen.T @ chosen.sum(axis=1)))
    starts = np.searchsorted(made, np.arange(_PRODUCTS, made[-1] if n_items else 0, _PRODUCTS))
    # The rows of a block also stand as dense ones for a moment.
    starts = np.union1d(starts, np.arange(0, n_items, max(1, _PRODUCTS // max(1, n_items))))
    for first, last in itertools.pairwise(np.unique([0, *starts, n_items])):
        block = (by_item[first:last] @ chosen).tocsr()
        block.sort_indices()
        row = np.repeat(np.arange(last - first), np.diff(block.indptr))
        weight = weigh(first + row, block.indices, block.data)
        # Sorting them all takes most of the time, and all but `count` of a row can be told by the count-th largest.
        rows = np.zeros(block.shape)
        rows[row, block.indices] = weight
        least = torch.from_numpy(rows).topk(min(count, n_items), dim=1).values[:, -1].numpy()
        found = np.flatnonzero((weight >= least[row]) & (weight > 0))
        row, items, weight = row[found], block.indices[found], weight[found]
        order = np.lexsort((-weight, row))  # stable: of equal ones the smaller item comes first
        rank = np.arange(len(order)) - np.searchsorted(row, row)
        best, place = order[rank < count], (first + row[rank < count], rank[rank < count])
        neighbors[place], weights[place] = items[best], weight[best]
    return neighbors, weights


def ones(matrix: csr_array) -> csr_array:
    """A float64 copy with 1 at every interaction, however often it was counted."""
    result = csr_array(matrix, copy=True)
    result.sum_duplicates()
    result.data = np.ones(result.nnz)
    return result
