"""Sampled ranking: a user's targets among few items drawn at random, 1+99 and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from recsys.data.dataset import EvalSet
from recsys.errors import RecsysError
from recsys.evaluation.ranking import Ranking, check_cutoffs, check_finite, entries, target_places

__all__ = [
    "Candidates",
    "ScoreItems",
    "check_negatives",
    "draw_candidates",
    "evaluate_sampled",
    "published_candidates",
    "rank_sampled",
]

ScoreItems = Callable[[NDArray[np.int64], csr_array, Tensor], Tensor]
"""`score_items(users, inputs, items) -> (B, C)`: as `recsys.models.base.Recommender.score_items`."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The items that every user's targets are ranked among, as a CSR structure: once made, they stay.

    Attributes:
        pointers: (m + 1,) int64; row r of the EvalSet owns `items[pointers[r]:pointers[r + 1]]`.
        items: int32, each at most once a row; neither inputs nor targets of the row.
        source: "drawn" or "published".
    """

    pointers: NDArray[np.int64]
    items: NDArray[np.int32]
    source: Literal["drawn", "published"]

    def with_fewer(self, eval_set: EvalSet, negatives: int) -> int:
        """How many users have fewer than `negatives` for each target: they have chosen too much, or (published) some of
        them were no negatives.
        """
        wanted = np.diff(eval_set.targets.indptr).astype(np.int64) * negatives
        return int(np.sum(np.diff(self.pointers) < wanted))


def check_negatives(negatives: int, n_items: int) -> None:
    """Raise RecsysError unless so many different items can be drawn beside a target."""
    if not 1 <= negatives < n_items:
        raise RecsysError(
            f"negatives: expected at least 1 and fewer than the {n_items} items that there are, got {negatives}; "
            "to rank the whole catalogue, take full ranking"
        )


def draw_candidates(eval_set: EvalSet, negatives: int, seed: int | np.random.SeedSequence) -> Candidates:
    """Draw `negatives` items for each target, uniformly without replacement from what the user has not chosen.

    A user with targets T is given |T| x negatives items, and all of T are ranked among them together, so that each
    metric keeps its formula (RecBole's "uni99" and the like do so; with one target it is NCF's leave-one-out). Where
    the catalogue has fewer items that are neither inputs nor targets, all of those. The result depends on nothing but
    the arguments: not on training, its seed or its random streams.

    Raises:
        RecsysError: negatives < 1, or no fewer than there are items.
    """
    rows, n_items = eval_set.inputs.shape
    check_negatives(negatives, n_items)
    rng = np.random.default_rng(seed)
    chosen = csr_array(eval_set.inputs + eval_set.targets)
    chosen.sort_indices()
    degree = np.diff(chosen.indptr).astype(np.int64)
    counts = np.minimum(np.diff(eval_set.targets.indptr).astype(np.int64) * negatives, n_items - degree)
    pointers = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    ranks = np.empty(pointers[-1], dtype=np.int64)
    for row in np.flatnonzero(counts):
        left = n_items - degree[row]
        drawn = rng.choice(left, counts[row], replace=False, shuffle=False)
        ranks[pointers[row] : pointers[row + 1]] = drawn
    # The r-th item that is not chosen is r plus the chosen ones before it, as in recsys.models.negatives.
    owner = np.repeat(np.arange(rows), counts)
    row_of = np.repeat(np.arange(rows), degree)
    nth = np.arange(chosen.nnz) - chosen.indptr[row_of]
    keys = row_of * (n_items + 1) + chosen.indices - nth
    before = np.searchsorted(keys, owner * (n_items + 1) + ranks, side="right") - chosen.indptr[owner]
    return Candidates(pointers, (ranks + before).astype(np.int32), "drawn")


def published_candidates(eval_set: EvalSet) -> Candidates:
    """The candidates that came with the data, `EvalSet.candidates`, once each.

    One that is a target of the user is left out of the user's ranking (NCF's files hold some), and so is one that is
    an input, as in full ranking.

    Raises:
        RecsysError: the set has none.
    """
    given = eval_set.candidates
    if given is None:
        raise RecsysError(
            "this set of users came without published candidates; draw them with draw_candidates"
        )
    rows, n_items = eval_set.inputs.shape
    chosen = csr_array(eval_set.inputs + eval_set.targets)
    row_of = np.repeat(np.arange(rows), np.diff(chosen.indptr))
    keys = np.unique(np.arange(rows)[:, None] * n_items + given)
    keys = np.setdiff1d(keys, row_of * n_items + chosen.indices, assume_unique=True)
    counts = np.bincount(keys // n_items, minlength=rows)
    pointers = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    return Candidates(pointers, (keys % n_items).astype(np.int32), "published")


def evaluate_sampled(
    score_items: ScoreItems,
    eval_set: EvalSet,
    candidates: Candidates,
    ks: Sequence[int] = (20,),
    batch_size: int = 512,
) -> dict[str, float]:
    """Metrics of `recsys.evaluation` for targets ranked among candidates; not comparable with `evaluate`'s.

    Args:
        score_items: gives the scores of some items of a batch of users.
        eval_set: users without targets are skipped.
        candidates: from `draw_candidates` or `published_candidates`, of this `eval_set`.
        ks: cut-offs. One may exceed the number of candidates.
        batch_size: users scored at once.

    Raises:
        RecsysError: no user has a target, a score is NaN or infinite, scores have the wrong shape, or the candidates
            are of another set.
    """
    return rank_sampled(score_items, eval_set, candidates, ks, batch_size).means(ks)


def rank_sampled(
    score_items: ScoreItems,
    eval_set: EvalSet,
    candidates: Candidates,
    ks: Sequence[int] = (20,),
    batch_size: int = 512,
) -> Ranking:
    """The ranks of all targets among their user's candidates; arguments and errors as in `evaluate_sampled`."""
    check_cutoffs(eval_set, ks, batch_size)
    if len(candidates.pointers) != len(eval_set) + 1:
        raise RecsysError(
            f"candidates: made for {len(candidates.pointers) - 1} users, but this set has {len(eval_set)}"
        )
    rows = eval_set.rows_with_targets
    counts = np.diff(eval_set.targets.indptr)[rows].astype(np.int64)
    widths = counts + np.diff(candidates.pointers)[rows]
    places = np.repeat(np.arange(len(rows)), counts)
    ranks = np.empty(len(places), dtype=np.int64)
    # Users with lists of about the same length together: the lists of a batch are filled up to the longest.
    order = np.argsort(widths, kind="stable")
    for start in range(0, len(rows), batch_size):
        part = np.sort(order[start : start + batch_size])
        ranks[np.isin(places, part)] = _batch_ranks(score_items, eval_set, candidates, rows[part])
    return Ranking(
        rows=rows,
        counts=counts,
        items=eval_set.targets.indices.astype(np.int64),
        ranks=ranks,
        depth=max(ks),
    )


def _batch_ranks(
    score_items: ScoreItems, eval_set: EvalSet, candidates: Candidates, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rank of every target of these rows: 1, plus candidates that score as much, plus targets before it."""
    owner, targets = entries(eval_set.targets, rows)
    n_targets = np.bincount(owner, minlength=len(rows))
    n_negatives = np.diff(candidates.pointers)[rows]
    first_target = np.concatenate([[0], n_targets.cumsum()[:-1]])
    # Each row: its targets, its candidates, and its first target again up to the longest row.
    width = int((n_targets + n_negatives).max())
    items = np.repeat(targets[first_target][:, None], width, axis=1)
    column = np.arange(len(targets)) - first_target[owner]
    items[owner, column] = targets
    of = np.repeat(np.arange(len(rows)), n_negatives)
    nth = np.arange(len(of)) - (n_negatives.cumsum() - n_negatives)[of]
    items[of, n_targets[of] + nth] = candidates.items[candidates.pointers[rows][of] + nth]

    with torch.no_grad():
        scores = score_items(eval_set.users[rows], eval_set.inputs[rows], torch.from_numpy(items))
    check_finite(scores, items.shape)
    device = scores.device
    place = torch.arange(width, device=device)
    begin, end = (
        torch.from_numpy(bound).to(device)[:, None] for bound in (n_targets, n_targets + n_negatives)
    )
    others = scores.masked_fill((place < begin) | (place >= end), -torch.inf).sort(dim=1).values
    owners = torch.from_numpy(owner).to(device)
    own = scores[owners, torch.from_numpy(column).to(device)]
    # How many candidates score as much or more: by a search in each row's sorted scores, for all its targets at once.
    wanted = scores[:, : int(n_targets.max())].contiguous()
    below = torch.searchsorted(others, wanted)[owners, torch.from_numpy(column).to(device)]
    return (1 + (width - below) + target_places(owners, own)).cpu().numpy()
