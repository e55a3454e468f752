"""The best of a whole catalogue, a block of items at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.backends.torch.embedding import gather

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
    """Scores (B, k) and row ids (B, k) of the k best rows for each query, best first."""
    n_queries, n_items, device = queries.shape[0], crow.shape[0] - 1, queries.device
    best = queries.new_full((n_queries, k), -torch.inf)
    ids = torch.full((n_queries, k), -1, dtype=torch.int64, device=device)
    owner = None
    if seen_crow is not None and seen_col is not None:
        owner = torch.repeat_interleave(seen_crow.diff().to(torch.int64), output_size=seen_col.numel())
    for first in range(0, n_items, _ITEMS):
        items = torch.arange(first, min(first + _ITEMS, n_items), device=device)
        scores = queries @ gather(values, crow, col, items, n_cols).t()
        candidates = items.expand(n_queries, -1)
        if owner is not None and seen_col is not None:
            here = (seen_col >= first) & (seen_col < first + items.numel())
            place = (owner[here], seen_col[here].to(torch.int64) - first)
            scores[place] = -torch.inf
            candidates = candidates.index_put(place, candidates.new_tensor(-1))
        # What was found before comes first, and the sort is stable: among equals the lower id stays.
        scores, order = torch.cat((best, scores), 1).sort(dim=1, descending=True, stable=True)
        best, ids = scores[:, :k], torch.cat((ids, candidates), 1).gather(1, order[:, :k])
    return best.contiguous(), ids.masked_fill(best == -torch.inf, -1)
