"""Full ranking: every item that is not in a user's history is ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from recsys.data.dataset import Dataset, EvalSet
from recsys.errors import RecsysError
from recsys.evaluation.ranking import (
    PerUser,
    Ranking,
    check_cutoffs,
    check_finite,
    target_entries,
    target_places,
)

__all__ = ["Score", "evaluate", "evaluate_oracle", "rank_full"]

Score = Callable[[NDArray[np.int64], csr_array], Tensor]
"""`score(users, inputs) -> (B, n_items)`: users as in EvalSet.users, inputs their (B, n_items) history."""


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
    """Rank all items for the users of `eval_set` and average the metrics of `recsys.evaluation`.

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
    ranking = rank_full(score, eval_set, ks, batch_size)
    return (ranking.means(ks), ranking.per_user(ks)) if per_user else ranking.means(ks)


def evaluate_oracle(
    dataset: Dataset, eval_set: EvalSet, ks: Sequence[int] = (20,), batch_size: int = 512
) -> dict[str, float]:
    """Metrics of the best-possible ranking of a synthetic dataset; raises RecsysError if it has no oracle."""
    oracle = dataset.oracle
    if oracle is None:
        raise RecsysError(f"{dataset.name}: only synthetic data knows its best-possible ranking")
    return _rank(lambda rows: torch.from_numpy(oracle(eval_set, rows)), eval_set, ks, batch_size).means(ks)


def rank_full(score: Score, eval_set: EvalSet, ks: Sequence[int] = (20,), batch_size: int = 512) -> Ranking:
    """Rank all items once, down to the largest of `ks`; arguments and errors as in `evaluate`."""

    def score_rows(rows: NDArray[np.int64]) -> Tensor:
        return score(eval_set.users[rows], eval_set.inputs[rows])

    return _rank(score_rows, eval_set, ks, batch_size)


def _rank(
    score_rows: Callable[[NDArray[np.int64]], Tensor],
    eval_set: EvalSet,
    ks: Sequence[int],
    batch_size: int,
) -> Ranking:
    check_cutoffs(eval_set, ks, batch_size)
    rows = eval_set.rows_with_targets
    n_items = eval_set.inputs.shape[1]
    depth = max(ks)
    recommended = np.full((len(rows), min(depth, n_items)), -1, dtype=np.int64)
    ranks = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with torch.no_grad():
            scores = score_rows(batch)
            check_finite(scores, (len(batch), n_items))
            reached, best = _batch_ranks(scores, eval_set, batch, min(depth, n_items))
        ranks.append(reached)
        recommended[start : start + len(batch), : best.shape[1]] = best
    return Ranking(
        rows=rows,
        counts=np.diff(eval_set.targets.indptr)[rows].astype(np.int64),
        items=eval_set.targets.indices.astype(np.int64),
        ranks=np.concatenate(ranks),
        depth=depth,
        recommended=recommended,
    )


def _batch_ranks(
    scores: Tensor, eval_set: EvalSet, rows: NDArray[np.int64], depth: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of every target of these rows (exact up to `depth`), and the `depth` best items of each row.

    The rank of a target is 1, plus the others that score as much or more, plus the targets before it.
    """
    device = scores.device
    ranked = scores.masked_fill(_dense_mask(eval_set.inputs[rows], device), -torch.inf)
    is_target = _dense_mask(eval_set.targets[rows], device)
    owner, items = (torch.from_numpy(part).to(device) for part in target_entries(eval_set, rows))
    own = ranked[owner, items]
    top, best = ranked.topk(depth, dim=1)
    others = top.masked_fill(is_target.gather(1, best), -torch.inf)
    before = (others[owner] >= own.unsqueeze(1)).sum(dim=1)
    # topk took any of the items that score as much as its last one: those are counted in the whole row.
    last = top[:, -1]
    tied = ((ranked == last.unsqueeze(1)) & ~is_target).sum(dim=1)
    above = (others > last.unsqueeze(1)).sum(dim=1)
    before = torch.where(own == last[owner], (above + tied)[owner], before)
    ranks = 1 + before + target_places(owner, own)
    ranks = torch.where(own < last[owner], depth + 1, ranks)
    best = best.masked_fill(top == -torch.inf, -1)
    return ranks.cpu().numpy(), best.cpu().numpy()


def _dense_mask(matrix: csr_array, device: torch.device) -> Tensor:
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    row_of = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    mask[torch.from_numpy(row_of), torch.from_numpy(matrix.indices.astype(np.int64))] = True
    return mask.to(device)
