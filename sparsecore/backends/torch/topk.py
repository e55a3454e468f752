"""The best of a whole catalogue, a block of items at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sparsecore.backends.torch.csr import indices

__all__ = ["score_topk"]

_ITEMS = 8192  # scores of a block: queries x 8192


def score_topk(
    queries: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    k: int,
    seen_crow: Tensor | None,
    seen_col: Tensor | None,
    n_cols: int,
) -> tuple[Tensor, Tensor]:
    """Scores (B, k) and row ids (B, k) of the k best rows for each query, best first; a NaN is not among them."""
    n_queries, n_items, device = queries.shape[0], crow.shape[0] - 1, queries.device
    crow, col = indices(crow, col, n_cols)
    bounds = [*range(0, n_items, _ITEMS), n_items]
    # Where each block's nonzeros lie, and its seen items: asked for once, a GPU is not waited for in the loop.
    edges = crow[torch.tensor(bounds, device=device)].tolist()
    owner, item, seen_edges = _seen_by_item(seen_crow, seen_col, bounds)
    best = queries.new_full((n_queries, k), -torch.inf)
    ids = torch.full((n_queries, k), -1, dtype=torch.int64, device=device)
    for block, (first, last) in enumerate(pairwise(bounds)):
        part = slice(edges[block], edges[block + 1])
        row = torch.repeat_interleave(
            crow[first : last + 1].diff().to(torch.int64), output_size=part.stop - part.start
        )
        items = values.new_zeros((last - first) * n_cols)
        items[row * n_cols + col[part]] = values[part]
        scores = queries @ items.view(-1, n_cols).t()
        scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        candidates = torch.arange(first, last, device=device).expand(n_queries, -1)
        hidden = slice(seen_edges[block], seen_edges[block + 1])
        if hidden.stop > hidden.start:
            place = (owner[hidden], item[hidden] - first)
            scores[place] = -torch.inf
            candidates = candidates.index_put(place, candidates.new_full((), -1))
        # What was found before comes first, and the sort is stable: among equals the lower id stays.
        scores, order = torch.cat((best, scores), 1).sort(dim=1, descending=True, stable=True)
        best, ids = scores[:, :k], torch.cat((ids, candidates), 1).gather(1, order[:, :k])
    return best.contiguous(), ids.masked_fill(best == -torch.inf, -1)


def _seen_by_item(
    crow: Tensor | None, col: Tensor | None, bounds: list[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """Query and item of every pair that is left out, by item, and where the items of each block begin."""
    if crow is None or col is None:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing, [0] * len(bounds)
    owner = torch.repeat_interleave(crow.diff().to(torch.int64), output_size=col.numel())
    item, order = col.to(torch.int64).sort()
    return owner[order], item, torch.searchsorted(item, torch.tensor(bounds, device=item.device)).tolist()
