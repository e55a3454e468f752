"""Where the targets of a set of users came, and the metrics that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from recsys.data.dataset import EvalSet
from recsys.errors import RecsysError

__all__ = [
    "METRICS",
    "PerUser",
    "Ranking",
    "check_cutoffs",
    "check_finite",
    "entries",
    "target_places",
]

METRICS = ("recall", "ndcg", "hr", "truncated_recall", "mrr", "map")

PerUser = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Ranking:
    """What an evaluation found, before it is cut off at a K.

    Attributes:
        rows: (m,) rows of the EvalSet that have targets, ascending: those that were evaluated.
        counts: (m,) targets of each of them, |T|.
        items: (sum of counts,) int64 targets, in the order of the EvalSet.
        ranks: (sum of counts,) int64 rank of each, 1 the best; beyond `depth` any value above it.
        depth: ranks up to here are exact.
        recommended: (m, depth) int64 items from the first rank on, at most as many as there are, -1 where fewer were
            left to rank; None after sampled ranking, which recommends nothing.
    """

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    items: NDArray[np.int64]
    ranks: NDArray[np.int64]
    depth: int
    recommended: NDArray[np.int64] | None = None

    @property
    def users(self) -> NDArray[np.int64]:
        """(sum of counts,) place 0..m-1 of every target's user among the evaluated ones."""
        return np.repeat(np.arange(len(self.rows)), self.counts)

    def per_user(self, ks: Sequence[int]) -> PerUser:
        """{"recall@20": (m,), ...} for every metric and K (at most `depth`), in the order of `rows`."""
        values: PerUser = {}
        for k in ks:
            if not 1 <= k <= self.depth:
                raise RecsysError(f"ks: expected cut-offs from 1 to {self.depth}, got {k}")
            for metric, array in zip(METRICS, self._metrics(k), strict=True):
                values[f"{metric}@{k}"] = array
        return values

    def means(self, ks: Sequence[int]) -> dict[str, float]:
        """`per_user` averaged over the evaluated users."""
        return {key: float(array.mean()) for key, array in self.per_user(ks).items()}

    def _metrics(self, k: int) -> tuple[NDArray[np.float64], ...]:
        """Per-user values in the order of METRICS."""
        k = min(
            k, int(self.ranks.max(initial=1))
        )  # a K beyond the last target, or the catalogue, changes nothing
        hits = np.zeros((len(self.rows), k), dtype=bool)
        found_at = self.ranks <= k
        hits[self.users[found_at], self.ranks[found_at] - 1] = True
        found = hits.sum(axis=1)
        reachable = np.minimum(self.counts, k)
        rank = np.arange(1, k + 1)
        discount = 1.0 / np.log2(rank + 1)
        ideal = np.cumsum(discount)[reachable - 1]
        first = np.where(found > 0, 1.0 / (hits.argmax(axis=1) + 1), 0.0)
        precision = (hits * hits.cumsum(axis=1) / rank).sum(axis=1)
        return (
            found / self.counts,
            (hits @ discount) / ideal,
            (found > 0).astype(np.float64),
            found / reachable,
            first,
            precision / reachable,
        )


def check_cutoffs(eval_set: EvalSet, ks: Sequence[int], batch_size: int) -> None:
    """Raise RecsysError for cut-offs or a batch size below 1, and if nobody has a target."""
    if not ks or any(k < 1 for k in ks):
        raise RecsysError(f"ks: expected cut-offs of at least 1, got {list(ks)}")
    if batch_size < 1:
        raise RecsysError(f"batch_size: expected at least 1, got {batch_size}")
    if not len(eval_set.rows_with_targets):
        raise RecsysError("nothing to evaluate: no user of this set has a target item")


def check_finite(scores: Tensor, shape: tuple[int, int]) -> None:
    """Raise RecsysError for scores of another shape, and for NaN and infinity."""
    if tuple(scores.shape) != shape:
        raise RecsysError(f"scores: expected shape {shape}, got {tuple(scores.shape)}")
    if not scores.numel():
        return
    # Extremes are infinite or NaN where any score of the row is, and take less time than to judge every score.
    finite = torch.isfinite(scores.amax(dim=1)) & torch.isfinite(scores.amin(dim=1))
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise RecsysError(
            f"scores: NaN or infinite for {bad} of {shape[0]} users in a batch; "
            "training has diverged (lower the learning rate) or the model file is damaged"
        )


def entries(matrix: csr_array, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The entries of some rows: place 0..len(rows)-1 of each one's row, and its item; (n,) int64 both."""
    part = matrix[rows]
    owner = np.repeat(np.arange(len(rows)), np.diff(part.indptr))
    return owner, part.indices.astype(np.int64)


def target_places(owner: Tensor, scores: Tensor) -> Tensor:
    """(n,) how many of the same user's targets come before each target: by score, then by order.

    owner is (n,) and ascending, scores (n,).
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    first = torch.searchsorted(owner, owner)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first
    return place
