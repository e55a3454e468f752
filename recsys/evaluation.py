"""Full-ranking evaluation: every item that is not in a user's history is ranked, none is sampled.

For a user with target set T, and hits h_1..h_K (h_r = 1 if the item at rank r is in T):

    recall@K            = sum_r h_r / |T|
    truncated_recall@K  = sum_r h_r / min(K, |T|)            (Liang et al., WWW 2018)
    hr@K                = 1 if any h_r else 0
    ndcg@K              = sum_r h_r / log2(r + 1)  /  sum_{r <= min(K, |T|)} 1 / log2(r + 1)
    mrr@K               = 1 / r of the first hit, 0 without one
    map@K               = sum_r h_r (h_1 + ... + h_r) / r  /  min(K, |T|)

Each is averaged over the users that have a target. Ties count against the model: of items with equal scores, those that
are targets come last. (Sparse tables give many equal scores: two rows without a common column score 0.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.data.dataset import Dataset, EvalSet
from recsys.errors import RecsysError

__all__ = ["METRICS", "Score", "evaluate", "evaluate_oracle"]

METRICS = ("recall", "ndcg", "hr", "truncated_recall", "mrr", "map")

Score = Callable[[NDArray[np.int64], csr_array], torch.Tensor]
"""`score(users, inputs) -> (B, n_items)`: users as in EvalSet.users, inputs their (B, n_items) history."""

PerUser = dict[str, NDArray[np.float64]]


@overload
def evaluate(
    score: Score,
    eval_set: EvalSet,
    ks: Sequence[int] = ...,
    batch_size: int = ...,
    per_user: Literal[False] = ...,
) -> dict[str, float]: ...
@overload
def evaluate(
    score: Score,
    eval_set: EvalSet,
    ks: Sequence[int] = ...,
    batch_size: int = ...,
    *,
    per_user: Literal[True],
) -> tuple[dict[str, float], PerUser]: ...
def evaluate(
    score: Score,
    eval_set: EvalSet,
    ks: Sequence[int] = (20,),
    batch_size: int = 512,
    per_user: bool = False,
) -> dict[str, float] | tuple[dict[str, float], PerUser]:
    """Rank all items for the users of `eval_set` and average the metrics of this module's docstring.

    Args:
        score: gives the scores of a batch of users, on any device. It runs without gradients; putting a model
            into evaluation mode is the caller's part.
        eval_set: users without targets are skipped; input items are excluded from the ranking.
        ks: cut-offs. One may exceed the number of items left to rank.
        batch_size: users scored at once; dense memory is batch_size x n_items scores.
        per_user: also return each evaluated user's values, in the order of `eval_set.rows_with_targets`.

    Returns:
        {"recall@20": ..., "ndcg@20": ..., ...} for every metric and K, or with `per_user` a pair of that and
        {"recall@20": (m,) float64, ...}.

    Raises:
        RecsysError: no user has a target, a score is NaN or infinite, or scores have the wrong shape.
    """

    def score_rows(rows: NDArray[np.int64]) -> torch.Tensor:
        return score(eval_set.users[rows], eval_set.inputs[rows])

    means, values = _evaluate(score_rows, eval_set, ks, batch_size)
    return (means, values) if per_user else means


def evaluate_oracle(
    dataset: Dataset, eval_set: EvalSet, ks: Sequence[int] = (20,), batch_size: int = 512
) -> dict[str, float]:
    """Metrics of the best-possible ranking of a synthetic dataset; raises RecsysError if it has no oracle."""
    oracle = dataset.oracle
    if oracle is None:
        raise RecsysError(f"{dataset.name}: only synthetic data knows its best-possible ranking")
    return _evaluate(lambda rows: torch.from_numpy(oracle(eval_set, rows)), eval_set, ks, batch_size)[0]


def _evaluate(
    score_rows: Callable[[NDArray[np.int64]], torch.Tensor],
    eval_set: EvalSet,
    ks: Sequence[int],
    batch_size: int,
) -> tuple[dict[str, float], PerUser]:
    if not ks or any(k < 1 for k in ks):
        raise RecsysError(f"ks: expected cut-offs of at least 1, got {list(ks)}")
    if batch_size < 1:
        raise RecsysError(f"batch_size: expected at least 1, got {batch_size}")
    rows = eval_set.rows_with_targets
    if not len(rows):
        raise RecsysError("nothing to evaluate: no user of this set has a target item")
    depth = min(max(ks), eval_set.inputs.shape[1])
    hits = np.empty((len(rows), depth), dtype=bool)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with torch.no_grad():
            hits[start : start + len(batch)] = _hits(score_rows(batch), eval_set, batch, depth)
    n_targets = np.diff(eval_set.targets.indptr)[rows]
    values: PerUser = {}
    for k in ks:
        for metric, array in zip(METRICS, _metrics(hits[:, :k], n_targets, k), strict=True):
            values[f"{metric}@{k}"] = array
    return {key: float(array.mean()) for key, array in values.items()}, values


def _hits(scores: torch.Tensor, eval_set: EvalSet, rows: NDArray[np.int64], depth: int) -> NDArray[np.bool_]:
    """Whether the item at rank 1..depth is a target, targets being the last of equal scores: (B, depth)."""
    expected = (len(rows), eval_set.inputs.shape[1])
    if tuple(scores.shape) != expected:
        raise RecsysError(f"scores: expected shape {expected}, got {tuple(scores.shape)}")
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        bad = int((~finite.all(dim=1)).sum())
        raise RecsysError(
            f"scores: NaN or infinite for {bad} of {len(rows)} users in a batch; "
            "training has diverged (lower the learning rate) or the model file is damaged"
        )
    ranked = scores.masked_fill(_dense_mask(eval_set.inputs[rows], scores.device), -torch.inf)
    is_target = _dense_mask(eval_set.targets[rows], scores.device)
    top, items = ranked.topk(depth, dim=1)
    hits = is_target.gather(1, items)
    # Equal scores above the last one: by target, then (stable) by score.
    order = hits.int().argsort(dim=1, stable=True)
    order = order.gather(1, top.gather(1, order).argsort(dim=1, descending=True, stable=True))
    hits = hits.gather(1, order)
    # topk took any of the items that score as much as the last one: it is as if their targets came last of them all.
    last = top[:, -1:]
    tied = ranked == last
    others = (tied & ~is_target).sum(dim=1, keepdim=True)
    first = (ranked > last).sum(dim=1, keepdim=True) + others
    place = torch.arange(depth, device=scores.device)
    reached = (place >= first) & (place < first - others + tied.sum(dim=1, keepdim=True))
    # Excluded items (-inf) can be the last where fewer than `depth` are left; they are never targets, so never hits.
    return torch.where(place < first - others, hits, reached).cpu().numpy()


def _dense_mask(matrix: csr_array, device: torch.device) -> torch.Tensor:
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    row_of = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    mask[torch.from_numpy(row_of), torch.from_numpy(matrix.indices.astype(np.int64))] = True
    return mask.to(device)


def _metrics(
    hits: NDArray[np.bool_], n_targets: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], ...]:
    """Per-user values in the order of METRICS. `hits` has min(k, n_items) columns."""
    found = hits.sum(axis=1)
    reachable = np.minimum(n_targets, k)
    rank = np.arange(1, hits.shape[1] + 1)
    discount = 1.0 / np.log2(rank + 1)
    ideal = np.cumsum(discount)[reachable - 1]
    first = np.where(found > 0, 1.0 / (hits.argmax(axis=1) + 1), 0.0)
    precision = (hits * hits.cumsum(axis=1) / rank).sum(axis=1)
    return (
        found / n_targets,
        (hits @ discount) / ideal,
        (found > 0).astype(np.float64),
        found / reachable,
        first,
        precision / reachable,
    )
