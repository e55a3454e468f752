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
    entries,
    target_places,
)

__all__ = ["Score", "evaluate", "evaluate_oracle", "rank_full"]

# 16 MiB of scores: larger blocks of memory come from the system each time, which clears them, and fit no cache.
_SCORES_AT_ONCE = 1 << 22
_PARTS = 64

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
        batch_size: users scored at once, at most: fewer where that would be more than 4 M scores.
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
    depth = min(max(ks), n_items)
    batch_size = min(batch_size, max(1, _SCORES_AT_ONCE // n_items))
    recommended = np.full((len(rows), depth), -1, dtype=np.int64)
    ranks = []
    space: Tensor | None = None
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with torch.no_grad():
            scores = score_rows(batch)
            check_finite(scores, (len(batch), n_items))
            if space is None or space.dtype != scores.dtype:
                width = -(-n_items // _PARTS) * _PARTS
                space = scores.new_full((min(batch_size, len(rows)), width), -torch.inf)
            reached, best = _batch_ranks(scores, eval_set, batch, depth, space[: len(batch)])
        ranks.append(reached)
        recommended[start : start + len(batch)] = best
    return Ranking(
        rows=rows,
        counts=np.diff(eval_set.targets.indptr)[rows].astype(np.int64),
        items=eval_set.targets.indices.astype(np.int64),
        ranks=np.concatenate(ranks),
        depth=max(ks),
        recommended=recommended,
    )


def _batch_ranks(
    scores: Tensor, eval_set: EvalSet, rows: NDArray[np.int64], depth: int, space: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of every target of these rows (exact up to `depth`), and the `depth` best items of each row.

    The rank of a target is 1, plus the others that score as much or more, plus the targets before it.
    `space` takes a copy of the scores, without the input items: columns after the last item hold -inf.
    """
    device, n_items = scores.device, scores.shape[1]
    space[:, :n_items] = scores
    ranked = space[:, :n_items]
    ranked[_entries(eval_set.inputs, rows, device)] = -torch.inf
    owner, items = _entries(eval_set.targets, rows, device)
    own = ranked[owner, items]
    top, best = _topk(space, depth)
    place = torch.arange(len(rows), device=device).unsqueeze(1) * n_items
    others = top.masked_fill(torch.isin(place + best, owner * n_items + items), -torch.inf)
    before = (others[owner] >= own.unsqueeze(1)).sum(dim=1)
    # topk took any of the items that score as much as its last one: where a target does, all are counted.
    last = top[:, -1]
    at_last = own == last[owner]
    unsure = owner[at_last].unique()
    tied = torch.zeros_like(place[:, 0])
    tied[unsure] = (ranked[unsure] == last[unsure].unsqueeze(1)).sum(dim=1)
    tied -= torch.bincount(owner[at_last], minlength=len(rows))
    above = (others > last.unsqueeze(1)).sum(dim=1)
    before = torch.where(at_last, (above + tied)[owner], before)
    ranks = 1 + before + target_places(owner, own)
    ranks = torch.where(own < last[owner], depth + 1, ranks)
    best = best.masked_fill(top == -torch.inf, -1)
    return ranks.cpu().numpy(), best.cpu().numpy()


def _topk(space: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """`space.topk(depth)` for a width that is a multiple of _PARTS.

    Each row is seen as _PARTS rows of columns: its best lie in the `depth` columns with the best maxima.
    (To select from a whole row takes torch ten times as long as to read it.)
    """
    width = space.shape[1] // _PARTS
    if depth >= width:
        return space.topk(depth, dim=1)
    columns = space.view(-1, _PARTS, width)
    chosen = columns.amax(dim=1).topk(depth, dim=1).indices
    offsets = torch.arange(_PARTS, device=space.device).unsqueeze(1) * width
    candidates = (chosen.unsqueeze(1) + offsets).flatten(1)
    top, at = space.gather(1, candidates).topk(depth, dim=1)
    return top, candidates.gather(1, at)


def _entries(matrix: csr_array, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    owner, items = entries(matrix, rows)
    return torch.from_numpy(owner).to(device), torch.from_numpy(items).to(device)
