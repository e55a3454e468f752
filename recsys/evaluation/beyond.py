"""What accuracy does not tell: how much of the catalogue is recommended, how popular it is, and who is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.errors import RecsysError
from recsys.evaluation.ranking import Ranking

__all__ = ["GROUPS", "beyond_accuracy", "popularity_groups"]

GROUPS = ("head", "mid", "tail")


def beyond_accuracy(ranking: Ranking, train: csr_array, ks: Sequence[int]) -> dict[str, float]:
    """Metrics of the lists themselves; popularity is that of the training data, p_i = users who chose item i.

        coverage@K       = items in anybody's first K / all items
        novelty@K        = mean over recommended items of -log2(max(p_i, 1) / n_users), in bits: the self-information
                           of meeting a user who chose the item (Zhou et al., PNAS 2010)
        gini@K           = Gini coefficient of how often each item is recommended: 0 all alike, near 1 a few only
        recall_head@K, recall_mid@K, recall_tail@K = recall among a user's targets in that group of
                           `popularity_groups`, averaged over the users who have such targets

    Sampled ranking (`ranking.recommended` is None) recommends nothing: it only has the recalls. A group without any
    target has no recall.

    Args:
        ranking: of the users with targets; others are recommended nothing.
        train: (n_users, n_items) interactions.
        ks: cut-offs of at most `ranking.depth`.
    """
    popularity = np.bincount(train.indices, minlength=train.shape[1])
    groups = popularity_groups(popularity)
    values: dict[str, float] = {}
    for k in ks:
        if k > ranking.depth:
            raise RecsysError(f"ks: expected cut-offs of at most {ranking.depth}, got {k}")
        if ranking.recommended is not None:
            shown = ranking.recommended[:, :k]
            exposure = np.bincount(shown[shown >= 0], minlength=len(popularity))
            bits = -np.log2(np.maximum(popularity, 1) / train.shape[0])
            values[f"coverage@{k}"] = float((exposure > 0).mean())
            values[f"novelty@{k}"] = float(exposure @ bits / exposure.sum())
            values[f"gini@{k}"] = _gini(exposure)
        group_of = groups[ranking.items]
        for number, name in enumerate(GROUPS):
            within = group_of == number
            users = ranking.users[within]
            wanted = np.bincount(users, minlength=len(ranking.rows))
            found = np.bincount(users, ranking.ranks[within] <= k, minlength=len(ranking.rows))
            if wanted.any():
                values[f"recall_{name}@{k}"] = float((found[wanted > 0] / wanted[wanted > 0]).mean())
    return values


def popularity_groups(popularity: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n_items,) 0 head, 1 mid, 2 tail: each has about a third of all interactions, so the head has fewest items.

    An item belongs where the middle of its interactions falls when items are laid end to end by falling popularity
    (equal ones by number). Items that nobody chose are tail.
    """
    order = np.argsort(-popularity, kind="stable")
    ends = popularity[order].cumsum()
    middle = (ends - popularity[order] / 2) / ends[-1]
    groups = np.empty(len(popularity), dtype=np.int64)
    groups[order] = np.minimum((middle * len(GROUPS)).astype(np.int64), len(GROUPS) - 1)
    return groups


def _gini(counts: NDArray[np.int64]) -> float:
    """G = sum_i (2 i - n - 1) x_i / (n sum_i x_i) for x in ascending order, i = 1..n."""
    x = np.sort(counts).astype(np.float64)
    n = len(x)
    return float(((2 * np.arange(1, n + 1) - n - 1) @ x) / (n * x.sum()))
